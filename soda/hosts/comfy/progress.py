"""What SODA Train shows while it runs: ComfyUI's progress bar, text on the node, the live curve, lines in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

import comfy.utils
from comfy.model_management import InterruptProcessingException
from PIL import Image

from .live import LiveTraining
from .preview import LARGEST
from .status import Throttle, duration, send
from .strip import Strip

log = logging.getLogger(__name__)
NOTES = 3  # on the node at a time


class TrainingProgress:
    """Told of every step; entered when training begins and left when it ends, in whatever way.

    Text on the node at most 4 times a second, a log line at most once in 2 s. `workflow` is the id of the graph that
    the node stands in. The samples shown are kept in `strip`.
    """

    def __init__(self, steps: int, node_id: str | None, workflow: str | None = None):
        self.steps = steps
        self.node_id = node_id
        self.notes: list[str] = []
        self._line = ""
        self.strip = Strip()
        self._live = LiveTraining(steps, node_id, workflow)
        self._bar = comfy.utils.ProgressBar(steps, node_id=node_id)
        self._text, self._log = Throttle(0.25), Throttle(2.0)
        self._taken = 0
        self._start = time.monotonic()

    def __enter__(self) -> TrainingProgress:
        self._live.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None:
            self._live.end("cancelled" if issubclass(kind, InterruptProcessingException) else "failed")
        else:
            self._live.end("stopped" if self._live.done < self.steps else "finished")

    def restore(self, losses: Iterable[float], samples: Sequence[Sequence[Any]] = ()) -> None:
        """Put the losses of steps taken in an earlier run on the curve, and its samples (`Strip.state`) on the strip;
        they do not count for the time left."""
        for done, loss in enumerate(losses, start=1):
            self._live.step(done, loss, None)
        self.strip.load_state(samples)
        self._tell_samples()

    def step(self, step: int, loss: float) -> None:
        """`step` counts from 0. One that was told before means that training went back to that state."""
        done = step + 1
        left = 0.0 if self.stop_requested() else self._time_left(done)
        self._live.step(done, loss, left)
        self._bar.update_absolute(done, self.steps)
        last = done == self.steps or self.stop_requested()
        self._line = f"step {done}/{self.steps}, loss {self._live.curve.smoothed:.4f}, {duration(left)} left"
        if self._text.ready() or last:
            self._send()
        if self._log.ready() or last:
            log.info("SODA Train: %s", self._line)

    def stop_requested(self) -> bool:
        """Whether a page asked to stop and keep what is learnt. Asked once per step, after it."""
        return self._live.state == "stopping"

    def preview(self, step: int, image: Image.Image) -> None:
        """Show a sample made after `step` on the node, and keep it for the strip."""
        self._bar.update_absolute(step + 1, self.steps, ("JPEG", image, LARGEST))
        self.strip.add(step + 1, image)
        self._tell_samples()

    def note(self, text: str) -> None:
        """A sentence that stays on the node below the running line."""
        self.notes.append(text)
        log.warning("SODA Train: %s", text)
        self._send()

    def pause(self, seconds: float) -> None:
        """Leave `seconds`, spent on something else than steps, out of the time left."""
        self._start += seconds

    def _tell_samples(self) -> None:
        self._live.sampled([number for number, _ in self.strip.samples])

    def _send(self) -> None:
        send("\n".join(line for line in (self._line, *self.notes[-NOTES:]) if line), self.node_id)

    def _time_left(self, done: int) -> float:
        """At the pace so far, without the first step where there are more: it also readies the model."""
        now = time.monotonic()
        if self._taken == 0:
            pace = now - self._start
            self._start = now
        else:
            pace = (now - self._start) / self._taken
        self._taken += 1
        return pace * (self.steps - done)
