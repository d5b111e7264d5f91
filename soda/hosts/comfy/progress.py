"""What SODA Train shows while it runs: ComfyUI's progress bar, text on the node, lines in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import comfy.utils
from PIL import Image

from .preview import LARGEST
from .status import Throttle, duration, send

log = logging.getLogger(__name__)
SMOOTHING = 0.9


class TrainingProgress:
    """Called once per step with its loss; text at most 4 times, a log line at most once in 2 s."""

    def __init__(self, steps: int, node_id: str | None):
        self.steps = steps
        self.node_id = node_id
        self.notes: list[str] = []
        self._bar = comfy.utils.ProgressBar(steps, node_id=node_id)
        self._text, self._log = Throttle(0.25), Throttle(2.0)
        self._start = time.monotonic()
        self._paused = 0.0
        self._restored = 0
        self._loss: float | None = None

    def step(self, step: int, loss: float) -> None:
        """`step` counts from 0."""
        self._loss = loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * loss
        done = step + 1
        self._bar.update_absolute(done, self.steps)
        last = done == self.steps
        fresh = max(1, done - self._restored)
        spent = time.monotonic() - self._start - self._paused
        line = f"step {done}/{self.steps}, loss {self._loss:.4f}, {duration(spent / fresh * (self.steps - done))} left"
        if self._text.ready() or last:
            send("\n".join([line, *self.notes]), self.node_id)
        if self._log.ready() or last:
            log.info("SODA Train: %s", line)

    def restore(self, losses: Sequence[float]) -> None:
        """The steps of an earlier run, whose time does not count."""
        for step, loss in enumerate(losses):
            self.step(step, loss)
        self._restored, self._start = len(losses), time.monotonic()

    def stop_requested(self) -> bool:
        return False

    def preview(self, step: int, image: Image.Image) -> None:
        self._bar.update_absolute(step + 1, self.steps, ("JPEG", image, LARGEST))

    def note(self, text: str) -> None:
        """A sentence that stays on the node below the running line."""
        self.notes.append(text)
        log.warning("SODA Train: %s", text)

    def pause(self, seconds: float) -> None:
        """Leave `seconds`, spent on something else than steps, out of the time left."""
        self._paused += seconds
