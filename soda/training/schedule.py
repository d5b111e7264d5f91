"""Learning-rate schedules: a linear rise over the first steps, then a way down to a rest, or none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]
# The share of the rate after `done` of the run, 0 to 1.
SHAPES: dict[Schedule, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1.0 - done,
    "constant": lambda done: 1.0,
}


def share(step: int, steps: int, schedule: Schedule = "cosine", warm_up: float = 0.05) -> float:
    """The share of the learning rate at `step`, counted from 0; `warm_up` is the share of the steps that rise."""
    warm = max(1, round(warm_up * steps))
    rise = min(1.0, (step + 1) / warm)
    return rise * SHAPES[schedule](step / steps)
