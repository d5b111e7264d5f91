"""Does a training run diverge?

Errors of diffusion models jump by the noise level drawn, by factors of ten and more in a batch of one. So it is their
logarithm that is averaged, l -> E (decay 0.9), and E is judged by the spread s of l in this very run:

    trouble    E > least E so far + log 3 + 2 s    at 5 steps in a row
    calm       E < least E so far + half of that

The least counts after 10 steps only, for at first E is that of a few noise levels. A rate far too high ruins a run
before that. So it is trouble as well to be worse than nothing, a model whose output is 0: with F the same average of
log error - log error of nothing, and where F < -log 2 at one of the first 10 steps,

    trouble    F > log 1.25    at 5 steps in a row
    calm       F < 0 as well

An error that is not finite is trouble at once.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

DECAY = 0.9
FIRST = 10
PATIENCE = 5
TIMES = 3.0
SPREADS = 2.0
BETTER, WORSE = 2.0, 1.25


@dataclass
class Guard:
    """All that it remembers are these numbers, so that it goes on from where a checkpoint left it."""

    steps: int = 0
    average: float = 0.0  # of log errors, to be divided by 1 - DECAY^steps
    relative: float = 0.0  # the same of errors over those of nothing
    better: bool = False  # than nothing, by far, at one of the first steps
    least: float = math.inf
    seen: int = 0  # log errors of calm steps, their mean and, summed, their squared distances from it (Welford)
    mean: float = 0.0
    squares: float = 0.0
    bad: int = 0
    calm: bool = True

    def sees(self, error: float, nothing: float | None = None) -> bool:
        """Whether the run has diverged with this step's error; `nothing`, if known, is that of an output of 0 on the
        same batch."""
        if not math.isfinite(error):
            return True
        log = math.log(max(error, 1e-30))
        self.steps += 1
        self.average = DECAY * self.average + (1 - DECAY) * log
        whole = 1 - DECAY**self.steps
        level = self.average / whole
        margin = math.log(TIMES) + SPREADS * math.sqrt(self.squares / max(1, self.seen - 1))
        above = level - self.least
        if nothing:
            over = log - math.log(nothing)
            self.relative = DECAY * self.relative + (1 - DECAY) * over
            self.better |= self.relative / whole < -math.log(BETTER) and self.steps <= FIRST
        beyond = self.relative / whole if self.better else -math.inf
        near = not above > margin / 2
        self.calm = near and not beyond > 0
        if near:  # what goes wrong does not widen the spread
            self.seen += 1
            distance = log - self.mean
            self.mean += distance / self.seen
            self.squares += distance * (log - self.mean)
        if self.steps >= FIRST:
            self.least = min(self.least, level)
        self.bad = self.bad + 1 if above > margin or beyond > math.log(WORSE) else 0
        return self.bad >= PATIENCE

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
