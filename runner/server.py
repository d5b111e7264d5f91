"""A ComfyUI server of our own on a loopback port, with this pack mounted and nothing else of the reader's."""

import contextlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from . import process
from .errors import RunError

PACK = "ComfyUI-SODA"  # the name of the pack's folder in custom_nodes
START_SECONDS = 240.0


class Server:
    """Starts on `with`, gone afterwards. Everything but `output` lies in a staging folder that is removed with it."""

    def __init__(
        self,
        comfyui: Path,
        python: str | Path,
        pack: Path,
        *,
        output: Path | None = None,
        port: int = 0,
        arguments: Sequence[str] = ("--cpu",),
        log: Path | None = None,
    ) -> None:
        self.comfyui, self.python, self.pack = comfyui, python, pack
        self.base = Path(tempfile.mkdtemp(prefix="soda-comfyui-"))
        self.output = output or self.base / "output"
        self.log = log or self.base / "server.log"
        self.arguments = arguments
        self.wanted_port = port
        self.port = port
        self.process = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Server":
        try:
            self._stage()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        if self.process is not None:
            process.stop(self.process)
        custom_nodes = self.base / "custom_nodes" / PACK
        with contextlib.suppress(OSError):  # never follow the link when the staging folder is removed
            unlink(custom_nodes)
        if not os.path.lexists(custom_nodes):
            shutil.rmtree(self.base, ignore_errors=True)

    def require_alive(self) -> None:
        """Raises where the server has died, with its exit code and its last words."""
        if self.process.poll() is not None:
            raise RunError(self._death())

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def _stage(self) -> None:
        """What ComfyUI takes for its own folder; a link to the pack alone: its parent would import all siblings."""
        for name in ("custom_nodes", "models", "input", "user", "temp"):
            (self.base / name).mkdir()
        self.output.mkdir(parents=True, exist_ok=True)
        link(self.pack, self.base / "custom_nodes" / PACK)

    def _start(self) -> None:
        if self.wanted_port and not is_free(self.wanted_port):
            raise RunError(f"Port {self.wanted_port} is taken; name another with --port, or leave --port out.")
        for _ in range(3):
            self.port = self.wanted_port or free_port()
            self._launch()
            with contextlib.suppress(_PortLost):
                return self._wait()
            process.stop(self.process)
        raise RunError("Other programs took every free port before ComfyUI could; run the command again.")

    def _launch(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        # Threads that wait without spinning: much faster where a browser or anything else wants the same few cores.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        with open(self.log, "wb") as output:
            self.process = process.start(
                self.python,
                [
                    str(self.comfyui / "main.py"),
                    *("--listen", "127.0.0.1", "--port", str(self.port)),
                    *("--base-directory", str(self.base), "--output-directory", str(self.output)),
                    *("--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes"),
                    *self.arguments,
                ],
                output=output,
                environment=environment,
                cwd=self.base,
            )

    def _wait(self) -> None:
        """Until /system_stats answers and the pack is loaded."""
        end = time.monotonic() + START_SECONDS
        while not self._answers():
            if self.process.poll() is not None:
                port_lost = re.search(r"address already in use|Errno 98|WinError 10048", self.log_text())
                if port_lost and not self.wanted_port:
                    raise _PortLost
                raise RunError(self._death())
            if time.monotonic() > end:
                raise RunError(f"ComfyUI did not answer in {START_SECONDS:.0f} s; its last words: {self._last_words()}")
            time.sleep(0.2)
        failed = re.search(rf"(Cannot import|Error while calling comfy_entrypoint in) .*{PACK}.*", self.log_text())
        if failed:
            raise RunError(f"ComfyUI could not load this pack: {failed.group(0)}")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5) as answer:
                return "system" in json.load(answer)
        except (urllib.error.URLError, OSError, ValueError):
            return False

    def _death(self) -> str:
        return f"The ComfyUI server died (exit code {self.process.returncode}); its last words: {self._last_words()}"

    def _last_words(self) -> str:
        """The end of the log; a log in the staging folder is copied out, since that folder goes away."""
        kept = self.log
        if self.log.parent == self.base:
            kept = Path(tempfile.gettempdir()) / f"{self.base.name}.log"
            shutil.copyfile(self.log, kept)
        lines = [line.strip() for line in self.log_text().splitlines() if line.strip()]
        return f"{' | '.join(lines[-3:]) or 'none'} (whole log: {kept})"


class _PortLost(Exception):
    """Another program took the port between our look and ComfyUI's bind."""


def link(target: Path, place: Path) -> None:
    """A symbolic link to a folder, or on Windows without that right a junction, which needs none."""
    try:
        place.symlink_to(target, target_is_directory=True)
    except OSError as error:
        if os.name != "nt":
            raise RunError(f"Cannot link {place} to {target} ({error.strerror}).") from error
        import _winapi

        try:
            _winapi.CreateJunction(str(target), str(place))
        except OSError as junction_error:
            raise RunError(f"Cannot link {place} to {target} ({junction_error}): use a local disk.") from error


def unlink(place: Path) -> None:
    """Removes what `link` made, and nothing of its target."""
    place.rmdir() if os.name == "nt" else place.unlink()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        if os.name != "nt":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
