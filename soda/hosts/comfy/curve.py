"""The loss curve of a run of any length in a bounded number of points."""

from __future__ import annotations

import math

LONGEST = 1000
SMOOTHING = 0.9


class LossCurve:
    """Points (step, loss, smoothed loss), steps counted from 1, for the steps that are multiples of `stride`.

    `stride` doubles, and every second point goes, whenever there are more than LONGEST. The smoothed loss is the
    exponential mean m_t = 0.9 m_{t-1} + 0.1 loss_t over all steps, divided by 1 - 0.9^t: without that it would start
    near 0 (Kingma and Ba 2015, section 3). A loss that is not finite is left out.
    """

    def __init__(self) -> None:
        self.points: list[tuple[int, float, float]] = []
        self.stride = 1
        self.smoothed = math.nan
        self._mean = self._weight = 0.0

    def add(self, step: int, loss: float) -> None:
        """A `step` that is not after the last one takes the curve back: training went back to an earlier state."""
        if self.points and self.points[-1][0] >= step:
            self.points = [point for point in self.points if point[0] < step]
            self._mean = self.points[-1][2] * self._weight if self.points else 0.0
            self._weight = self._weight if self.points else 0.0
        if not math.isfinite(loss):
            return
        self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * loss
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self.smoothed = self._mean / self._weight
        if step % self.stride == 0:
            self.points.append((step, loss, self.smoothed))
        if len(self.points) > LONGEST:
            self.stride *= 2
            self.points = [point for point in self.points if point[0] % self.stride == 0]
