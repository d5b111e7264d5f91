"""Does a training run diverge?

Errors of diffusion models jump by the noise level drawn, by factors of ten and more in a batch of one. So it is their
logarithm that is averaged, l -> E (decay 0.9), and E is judged by the spread s of l in this very run:

    trouble    E > least E so far + log 3 + 2 s    at 5 steps in a row
    calm       E < least E so far + half of that

After 10 steps only; an error that is not finite is trouble at once.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

DECAY = 0.9
FIRST = 10
PATIENCE = 5
TIMES = 3.0
SPREADS = 2.0


@dataclass
class Guard:
    """All that it remembers are these numbers, so that it goes on from where a checkpoint left it."""

    steps: int = 0
    average: float = 0.0  # of log errors, to be divided by 1 - DECAY^steps
    least: float = math.inf
    seen: int = 0  # log errors of calm steps, their mean and, summed, their squared distances from it (Welford)
    mean: float = 0.0
    squares: float = 0.0
    bad: int = 0
    calm: bool = True

    def sees(self, error: float) -> bool:
        """Whether the run has diverged with this step's error."""
        if not math.isfinite(error):
            return True
        log = math.log(max(error, 1e-30))
        self.steps += 1
        self.average = DECAY * self.average + (1 - DECAY) * log
        level = self.average / (1 - DECAY**self.steps)
        margin = math.log(TIMES) + SPREADS * math.sqrt(self.squares / max(1, self.seen - 1))
        above = level - self.least
        self.calm = not above > margin / 2
        if self.calm:  # what goes wrong does not widen the spread
            self.seen += 1
            distance = log - self.mean
            self.mean += distance / self.seen
            self.squares += distance * (log - self.mean)
        if self.steps >= FIRST:
            self.least = min(self.least, level)
        self.bad = self.bad + 1 if above > margin else 0
        return self.bad >= PATIENCE

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
