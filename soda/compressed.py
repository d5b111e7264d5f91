"""A spectral change kept in 8 bits, for weights that are adapted anew in every forward.

    D[i, j] ~ scale[i, b] q[i, j]        b: the block of up to 64 neighbouring columns that j lies in

    q int8 from -127 to 127,  scale = max |D| of the block / 127, in bf16

The error is at most scale / 2 a number: 0.6 % of a Gaussian D, where rounding the weight itself to bf16 costs D as much
(lq). Each number takes 1.03 bytes, whatever the decomposition; the vectors of a basis take 2 (lq, qr) or 4 (svd), and
for svd two products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
LARGEST = 127


class Compressed(NamedTuple):
    """q `(rows, blocks, block)` int8 and scale `(rows, blocks, 1)` bf16 of a D `(rows, in)`, on one device."""

    numbers: Tensor
    scales: Tensor

    @classmethod
    def of(cls, change: Tensor) -> Compressed:
        """From a D `(rows, in)`, fp32 or fp64. A block whose scale bf16 cannot hold becomes 0."""
        count = -(-change.shape[1] // BLOCK)
        blocks = F.pad(change, (0, -change.shape[1] % count)).unflatten(1, (count, -1))
        scales = (blocks.abs().amax(-1, keepdim=True) / LARGEST).bfloat16()
        numbers = (blocks / scales.to(blocks)).nan_to_num_(0.0).round_().clamp_(-LARGEST, LARGEST)
        return cls(numbers.to(torch.int8), scales)

    def add_to(self, weight: Tensor, strength: float = 1.0) -> None:
        """weight += strength D, for a weight `(out, in)`, out >= rows, fp32 or fp64 on the same device."""
        change = (self.numbers * (self.scales.to(weight.dtype) * strength)).flatten(1)
        weight[: len(change)] += change[:, : weight.shape[1]]
