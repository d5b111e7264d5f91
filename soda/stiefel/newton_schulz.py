"""The polar factor M (M^T M)^(-1/2), the nearest matrix with orthonormal columns, by Newton-Schulz steps.

With S = M^T M - I the step is M <- M (I - S / 2), which turns S into -3/4 S^2 + 1/4 S^3. It converges for eigenvalues
of S in (-1, 2). There is no normalisation first: the matrices of an optimizer's step are near the manifold, where one
or two steps reach rounding.

On a CPU S is looked at: entries of the next S are at most 3/4 of the largest squared row of S, and the steps end as
soon as that is rounding. On other devices a look would wait for the device, so there the steps are as many as the
worst S needs. (Higham, Functions of Matrices, 2008, section 8.3.)
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def newton_schulz_steps(error: float, tolerance: float) -> int:
    """Steps that bring |S|_2 from `error` to `tolerance`; at least one."""
    steps, error = 1, 0.75 * error**2 + 0.25 * error**3
    while error > tolerance:
        steps, error = steps + 1, 0.75 * error**2 + 0.25 * error**3
    return steps


def polar(m: Tensor, error: float = 0.5, follow: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """The polar factor of each `(..., n, m)`, n >= m, in M's dtype, for |M^T M - I|_2 <= `error` < 1.

    `follow`, `(..., n, m)` too, is multiplied in place by the same (M^T M)^(-1/2). `out`, contiguous and of M's shape,
    takes the result.
    """
    bank, on_cpu = m.reshape(-1, *m.shape[-2:]), m.device.type == "cpu"
    tolerance = torch.finfo(m.dtype).eps
    for left in reversed(range(newton_schulz_steps(error, tolerance))):
        s = torch.bmm(bank.mT, bank)
        s.diagonal(dim1=-2, dim2=-1).sub_(1)
        last = left == 0 or (on_cpu and not 0.75 * float(torch.linalg.vector_norm(s, dim=-1).max()) ** 2 > tolerance)
        if follow is not None:
            follow.copy_(torch.baddbmm(follow.view_as(bank), follow.view_as(bank), s, alpha=-0.5).view_as(follow))
        bank = torch.baddbmm(bank, bank, s, alpha=-0.5, out=out.view_as(bank) if last and out is not None else None)
        if last:
            break
    return bank.view(m.shape)
