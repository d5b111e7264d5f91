"""What pages know about trainings: the state of those that run or ran last, told as it changes and on request.

Every page gets the event "soda.training" with the points since the last one; a page that opens later asks for all.
Pages may ask a running training to stop: it ends after its step and keeps what it has learnt.
"""

from __future__ import annotations

import math
import threading
from typing import Literal

from comfy_execution.utils import get_executing_context

from .curve import LossCurve
from .status import Throttle, broadcast

EVENT = "soda.training"
KEPT = 8  # trainings
EVERY = 0.25  # seconds between two events of one training
State = Literal["running", "stopping", "finished", "stopped", "cancelled", "failed"]

_lock = threading.Lock()  # trainings are written by the thread that runs prompts and read by the server's
_trainings: dict[tuple[str | None, str], LiveTraining] = {}


class LiveTraining:
    """One run of one node.

    `node` is ComfyUI's id of it (in a subgraph "12:3"), `workflow` the id of the graph it stands in, where known:
    other workflows have nodes of the same id. Without a node, as in a library, nobody is told.
    """

    def __init__(self, steps: int, node: str | None, workflow: str | None = None):
        self.steps, self.node, self.workflow = steps, node, workflow
        context = get_executing_context()
        self.prompt = context.prompt_id if context is not None else None
        self.state: State = "running"
        self.done = 0
        self.left: float | None = None
        self.samples: list[int] = []
        self.curve = LossCurve()
        self._told = 0  # the last step whose point every page has
        self._throttle = Throttle(EVERY)

    @property
    def running(self) -> bool:
        return self.state in ("running", "stopping")

    def begin(self) -> None:
        """List it, in place of an earlier run of the same node, and forget the oldest ones that are over."""
        if self.node is None:
            return
        with _lock:
            _trainings.pop((self.workflow, self.node), None)
            _trainings[self.workflow, self.node] = self
            over = [key for key, training in _trainings.items() if not training.running]
            for key in over[: max(0, len(_trainings) - KEPT)]:
                del _trainings[key]
        self.tell()

    def step(self, done: int, loss: float, left: float | None) -> None:
        """`done` steps are taken, the last with that loss; about `left` seconds remain."""
        with _lock:
            self.done, self.left = done, left
            self.curve.add(done, loss)
        if self._throttle.ready():
            self.tell()

    def sampled(self, steps: list[int]) -> None:
        """There are samples made after these steps."""
        with _lock:
            self.samples = steps
        self.tell()

    def end(self, state: State) -> None:
        with _lock:
            self.state, self.left = state, None
        self.tell()

    def summary(self, since: int) -> dict:
        """As JSON, with the points after step `since`."""
        loss = self.curve.smoothed
        return {
            "node": self.node, "workflow": self.workflow, "prompt": self.prompt, "state": self.state,
            "steps": self.steps, "done": self.done, "loss": None if math.isnan(loss) else loss, "left": self.left,
            "samples": self.samples, "stride": self.curve.stride, "since": since,
            "points": [point for point in self.curve.points if point[0] > since],
        }  # fmt: skip

    def tell(self) -> None:
        """Send every page what is new."""
        if self.node is None:
            return
        with _lock:
            # The last point that pages have and that is still on the curve, which may have been thinned or taken back.
            since = max((step for step, *_ in self.curve.points if step <= self._told), default=0)
            data = self.summary(since)
            self._told = self.curve.points[-1][0] if self.curve.points else 0
            broadcast(EVENT, data)


def summaries() -> list[dict]:
    """All that is known, oldest first."""
    with _lock:
        return [training.summary(0) for training in _trainings.values()]


def stop(node: str, prompt: str) -> bool:
    """Have the training of that node in that prompt end after its step; False where it does not run."""
    with _lock:
        found = next((t for t in _trainings.values() if (t.node, t.prompt) == (node, prompt) and t.running), None)
        if found is not None:
            found.state = "stopping"
    if found is not None:
        found.tell()
    return found is not None
