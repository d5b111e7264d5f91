"""A spectral change kept in 8 bits, for weights that are adapted anew in every forward.

    D[i, j] ~ scale[i, b] q[i, j]        b: the block of up to 64 neighbouring columns that j lies in

    q int8 from -127 to 127,  scale = max |D| of the block / 127, in bf16

The error is at most scale / 2 a number: 0.6 % of a Gaussian D, where rounding the weight itself to bf16 costs D as much
(lq). Each number takes 1.03 bytes, whatever the decomposition; the vectors of a basis take 2 (lq, qr) to 4 (svd), and
for svd a product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
LARGEST = 127


class Compressed(NamedTuple):
    """Scales and q of a D `(rows, in)`, one after the other in one tensor of bytes, so that one copy moves them.

    shape: (rows, blocks, block).
    """

    data: Tensor
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, change: Tensor) -> Compressed:
        """From a D `(rows, in)`, fp32 or fp64. A block whose scale bf16 cannot hold becomes 0."""
        rows, columns = change.shape
        count = -(-columns // BLOCK)
        blocks = F.pad(change, (0, -columns % count)).unflatten(1, (count, -1))
        scales = (blocks.abs().amax(-1, keepdim=True) / LARGEST).bfloat16()
        numbers = (blocks / scales.to(blocks)).nan_to_num_(0.0).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
        data = torch.cat([part.flatten().view(torch.uint8) for part in (scales, numbers)])
        return cls(data, (rows, count, blocks.shape[-1]))

    def add_to(self, weight: Tensor, strength: float = 1.0) -> None:
        """weight += strength D, in fp32, for a contiguous weight `(out, in)`, out >= rows, on the same device."""
        rows, count, block = self.shape
        scales, numbers = self.data.split([2 * rows * count, self.data.numel() - 2 * rows * count])
        scales, numbers = scales.view(torch.bfloat16).view(rows, count, 1), numbers.view(torch.int8).view(self.shape)
        if count * block == weight.shape[1]:
            weight[:rows].view(self.shape).addcmul_(numbers, scales, value=strength)  # one launch
        else:
            weight[:rows] += (numbers * scales.float()).flatten(1)[:, : weight.shape[1]] * strength
