"""A client of ComfyUI's server: HTTP for prompts, files and node definitions, its websocket for what happens meanwhile.

Runs in ComfyUI's Python, since it needs aiohttp.
"""

import asyncio
import contextlib
import json
import queue
import struct
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

from .server import Server

TEXT_MESSAGE = 3  # the binary websocket message that carries a node's text


class Refused(Exception):
    """The server answered with an HTTP error, as it does for an invalid prompt: `status` and `body` say why."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"HTTP {status}: {body}")
        self.status, self.body = status, body

    def reasons(self) -> str:
        """What was wrong with which node of a prompt, in one line."""
        nodes = json.loads(self.body)["node_errors"].values()
        return "; ".join(f"{n['class_type']}: {e['message']}, {e['details']}" for n in nodes for e in n["errors"])


class PromptFailed(Exception):
    """A node raised while a prompt ran, or the prompt was interrupted; `result` is what had happened until then."""

    def __init__(self, message: str, result: "Result") -> None:
        super().__init__(message)
        self.result = result


@dataclass
class Result:
    """One executed prompt. `outputs` by node id as in /history; `texts` the lines each node showed while it ran."""

    prompt_id: str
    outputs: dict[str, dict] = field(default_factory=dict)
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    error: dict | None = None

    def images(self, node: str) -> list[dict]:
        return self.outputs[node]["images"]


class Client:
    """One websocket connection, read in a thread; closed on leaving `with`."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.id = uuid.uuid4().hex
        self._events: queue.Queue = queue.Queue()
        self._loop = asyncio.new_event_loop()
        self._connected = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> "Client":
        self._thread.start()
        if not self._connected.wait(30):
            raise ConnectionError(f"no websocket to {self.server.url} within 30 s")
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)

    def get(self, path: str) -> bytes:
        return self._request(path)

    def get_json(self, path: str):
        return json.loads(self._request(path))

    def post(self, path: str, data: object = None) -> bytes:
        return self._request(path, json.dumps(data if data is not None else {}).encode())

    def view(self, image: dict) -> bytes:
        """The bytes of an image that a node reported."""
        query = {name: image[name] for name in ("filename", "subfolder", "type")}
        return self.get("/view?" + urllib.parse.urlencode(query))

    def interrupt(self) -> None:
        self.post("/interrupt")

    def queue(self, prompt: dict) -> str:
        """Puts an API-format prompt in the queue -> its id; Refused when the server finds it invalid."""
        return json.loads(self.post("/prompt", {"prompt": prompt, "client_id": self.id}))["prompt_id"]

    def run(self, prompt: dict, on_event: Callable[[str, dict], None] | None = None, timeout: float = 600) -> Result:
        """Queues a prompt and waits for its end; PromptFailed if a node raised. `on_event` gets each message."""
        while not self._events.empty():  # left over from earlier prompts
            self._events.get()
        prompt_id = self.queue(prompt)
        result = Result(prompt_id)
        end = time.monotonic() + timeout
        while True:
            try:
                kind, data = self._events.get(timeout=1)
            except queue.Empty:
                self.server.require_alive()
                if time.monotonic() > end:
                    raise TimeoutError(f"prompt {prompt_id} did not end within {timeout:.0f} s") from None
                continue
            if data.get("prompt_id", prompt_id) != prompt_id:
                continue
            if on_event is not None:
                on_event(kind, data)
            if self._note(result, kind, data):
                break
        # The server files a prompt's history after its last message.
        while prompt_id not in (history := self.get_json(f"/history/{prompt_id}")):
            time.sleep(0.05)
        result.outputs = history[prompt_id]["outputs"]
        if result.error is not None:
            raise PromptFailed(result.error["message"], result)
        return result

    @staticmethod
    def _note(result: Result, kind: str, data: dict) -> bool:
        """Writes one message down -> whether it was the prompt's last."""
        if kind == "executing" and data["node"] is not None:
            result.executed.append(data["node"])
        elif kind == "execution_cached":
            result.cached = list(data["nodes"])
        elif kind == "text":
            result.texts.setdefault(data["node"], []).append(data["text"])
        elif kind == "execution_error":
            message = data["exception_message"].strip()
            result.error = {"node": data["node_id"], "type": data["node_type"], "message": message}
        elif kind == "execution_interrupted":
            result.error = {"node": data["node_id"], "type": data["node_type"], "message": "interrupted"}
        return kind in ("execution_error", "execution_interrupted", "execution_success")

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.server.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode(errors="replace")) from error
        except OSError:
            self.server.require_alive()  # the better message, where the server is gone
            raise

    def _listen(self) -> None:
        self._task = self._loop.create_task(self._receive())
        with contextlib.suppress(asyncio.CancelledError, aiohttp.ClientError):
            self._loop.run_until_complete(self._task)
        self._loop.close()

    async def _receive(self) -> None:
        async with aiohttp.ClientSession() as session:
            address = f"{self.server.url}/ws?clientId={self.id}"
            async with session.ws_connect(address, max_msg_size=0, heartbeat=None) as socket:
                self._connected.set()
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.TEXT:
                        event = json.loads(message.data)
                        self._events.put((event["type"], event["data"]))
                    elif message.type == aiohttp.WSMsgType.BINARY:
                        self._binary(message.data)

    def _binary(self, data: bytes) -> None:
        """Node text: 4 bytes of kind, 4 of the id's length, the id, the text (big endian, UTF-8). No previews."""
        if struct.unpack(">I", data[:4])[0] == TEXT_MESSAGE:
            length = struct.unpack(">I", data[4:8])[0]
            node, text = data[8 : 8 + length].decode(), data[8 + length :].decode()
            self._events.put(("text", {"node": node, "text": text}))
