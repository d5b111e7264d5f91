"""Text on a node while it runs: through ComfyUI's progress text, and in the log for a prompt without a page."""

from __future__ import annotations

import logging
import time

from server import PromptServer

log = logging.getLogger(__name__)


def show(text: str, node_id: str | None) -> None:
    """Show `text` on the node and log it. Without a server (ComfyUI used as a library) it is only logged."""
    log.info("%s", text)
    send(text, node_id)


def send(text: str, node_id: str | None) -> None:
    """Show `text` on the node only."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def broadcast(event: str, data: dict) -> None:
    """Send an event of the pack's own to every open page; `data` must not change afterwards."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_sync(event, data)


class Throttle:
    """True at most once in `seconds`: keeps a fast loop from flooding a websocket or a log."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._last = -float("inf")

    def ready(self) -> bool:
        now = time.monotonic()
        if now - self._last < self.seconds:
            return False
        self._last = now
        return True


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
