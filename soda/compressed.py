"""A spectral change kept in 8 or 16 bits, for weights that are adapted again and again.

    D[i, j] ~ scale[i, b] q[i, j]        b: the block of up to 64 neighbouring columns that j lies in

    q int8 from -127 to 127 or int16 from -32767 to 32767,  scale = max |D| of the block / the largest q, up in bf16

The error is at most scale / 2 a number: of a Gaussian D 0.6 % in 8 bits, where rounding the weight itself to bf16 costs
D as much (lq), and 2e-5 in 16 bits, a tenth of what the vectors' own rounding costs. Each number takes 1.03 or 2.03
bytes, whatever the decomposition; the vectors of a basis take 2 (lq, qr) to 4 (svd), and for svd a product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
UP = 1 + 2**-8  # what bf16 may round off; so that no q is beyond the largest
ALIGNED = 16  # bytes
TINY = torch.tensor(torch.finfo(torch.bfloat16).tiny)  # no scale is 0


class Compressed(NamedTuple):
    """Scales and q of a D `(rows, in)`, one after the other in one tensor of bytes, so that one copy moves them.

    shape: (rows, blocks, block). dtype: that of q.
    """

    data: Tensor
    shape: tuple[int, int, int]
    dtype: torch.dtype

    @classmethod
    def each(cls, changes: Tensor, dtype: torch.dtype) -> list[Compressed]:
        """From D `(n, rows, in)`, fp32 or fp64, with q in int8 or int16; the n share their memory.

        By few launches: each takes a GPU's host longer than the numbers take the GPU.
        """
        n, rows, columns = changes.shape
        count = -(-columns // BLOCK)
        padding = -columns % count
        blocks = (F.pad(changes, (0, padding)) if padding else changes).unflatten(-1, (count, -1))
        shape = (rows, count, blocks.shape[-1])
        size = 2 * rows * count + dtype.itemsize * blocks[0].numel()
        data = torch.empty(n, -(-size // ALIGNED) * ALIGNED, dtype=torch.uint8, device=changes.device)[:, :size]
        scales, numbers = _parts(data, shape, dtype)
        if changes.is_cuda:
            largest = torch.linalg.vector_norm(blocks, torch.inf, -1, keepdim=True)
        else:
            largest = blocks.abs().amax(-1, keepdim=True)  # the norm takes a CPU 18 times as long
        torch.add(TINY, largest, alpha=UP / torch.iinfo(dtype).max, out=scales)
        numbers.copy_((blocks / scales).round_())
        return [cls(one, shape, dtype) for one in data]

    def add_to(self, weight: Tensor, strength: float = 1.0) -> None:
        """weight += strength D, in fp32, for a contiguous weight `(out, in)`, out >= rows, on the same device."""
        rows, count, block = self.shape
        scales, numbers = _parts(self.data, self.shape, self.dtype)
        if count * block == weight.shape[1]:
            weight[:rows].view(self.shape).addcmul_(numbers, scales, value=strength)  # one launch
        else:
            weight[:rows] += (numbers * scales.float()).flatten(1)[:, : weight.shape[1]] * strength


def _parts(data: Tensor, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales `(..., rows, blocks, 1)` and q `(..., rows, blocks, block)` in bytes `(..., size)`."""
    rows, count, _ = shape
    scales, numbers = data.split([2 * rows * count, data.shape[-1] - 2 * rows * count], -1)
    own = data.shape[:-1]
    return scales.view(torch.bfloat16).view(*own, rows, count, 1), numbers.view(dtype).view(*own, *shape)
