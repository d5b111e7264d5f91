"""An exponential moving average of the trained numbers.

Of the numbers X_1 ... X_t after each step it is  sum (1 - d) d^(t - i) X_i / (1 - d^t): of those seen, none of the
start. The average of rotations is no rotation; its polar factor, the nearest one, is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Average:
    """Of `rotations` `(..., n, n)` and `others`, which are read at each `update` and written by `write`."""

    def __init__(self, rotations: Sequence[Tensor], others: Sequence[Tensor], decay: float):
        self.rotations, self.others, self.decay = rotations, others, decay
        self.sums = [torch.zeros_like(t, requires_grad=False) for t in (*rotations, *others)]
        self.weight = 0.0

    @torch.no_grad()
    def update(self) -> None:
        for total, value in zip(self.sums, (*self.rotations, *self.others), strict=True):
            total.lerp_(value, 1 - self.decay)
        self.weight += (1 - self.decay) * (1 - self.weight)

    @torch.no_grad()
    def write(self) -> None:
        """Put the average into the tensors; before the first update there is none, and they stay."""
        if not self.weight:
            return
        for value, total in zip(self.rotations, self.sums, strict=False):
            value.copy_(polar(total))
        for value, total in zip(self.others, self.sums[len(self.rotations) :], strict=True):
            value.copy_(total / self.weight)


def polar(x: Tensor) -> Tensor:
    """The orthogonal matrices nearest to x `(..., n, n)` of full rank; fp64 on the CPU."""
    u, _, vh = torch.linalg.svd(x.detach().to("cpu", torch.float64))
    return u @ vh
