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


def newton_schulz(m: Tensor, error: float, s: Tensor, out: Tensor, follow: Tensor | None = None) -> Tensor:
    """`out` becomes the polar factor of M `(B, n, m)` with |S|_2 <= `error`; returns it. M and S `(B, m, m)` are lost.

    `follow`, `(B, n, m)`, is multiplied in place by the same (M^T M)^(-1/2).
    """
    tolerance, on_cpu = 2 * torch.finfo(m.dtype).eps, m.device.type == "cpu"
    result = out
    for left in reversed(range(newton_schulz_steps(error, tolerance))):
        torch.bmm(m.mT, m, out=s)
        s.diagonal(dim1=-2, dim2=-1).sub_(1)
        last = left == 0 or (on_cpu and not 0.75 * float(torch.linalg.vector_norm(s, dim=-1).max()) ** 2 > tolerance)
        if follow is not None:
            follow.copy_(torch.baddbmm(follow, follow, s, alpha=-0.5))
        torch.baddbmm(m, m, s, alpha=-0.5, out=result)
        m, result = result, m
        if last:
            break
    return m if m is out else out.copy_(m)


def polar(m: Tensor, error: float = 0.5) -> Tensor:
    """The polar factor of each `(..., n, m)`, n >= m, in M's dtype, for |M^T M - I|_2 <= `error` < 1."""
    bank = m.reshape(-1, *m.shape[-2:]).clone()
    s = m.new_empty(len(bank), m.shape[-1], m.shape[-1])
    return newton_schulz(bank, error, s, torch.empty_like(bank)).view(m.shape)
