"""The polar factor M (M^T M)^(-1/2), the nearest matrix with orthonormal columns, by Newton-Schulz steps.

With S = M^T M - I the step is M <- M (I - S / 2), which turns S into -3/4 S^2 + 1/4 S^3. It converges for eigenvalues
of S in (-1, 2). There is no normalisation first: the matrices of an optimizer's step are near the manifold, where one
or two steps reach rounding.

A bound on |S|_2 says how many steps may be needed. On a CPU S is looked at where that is more than one: entries of the
next S are at most 3/4 of the largest squared row of S, and the steps end as soon as that is rounding. On other devices
a look would wait for the device. (Higham, Functions of Matrices, 2008, section 8.3.)
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1024)
def newton_schulz_steps(error: float, tolerance: float) -> int:
    """Steps that bring |S|_2 from `error` to `tolerance`; at least one."""
    steps, error = 1, 0.75 * error**2 + 0.25 * error**3
    while error > tolerance:
        steps, error = steps + 1, 0.75 * error**2 + 0.25 * error**3
    return steps


def newton_schulz(
    ms: list[Tensor], errors: list[float], ss: list[Tensor], outs: list[Tensor], follow: list[Tensor | None]
) -> None:
    """Each `out` becomes the polar factor of its M `(B, n, m)` with |S|_2 <= `error`; M and S `(B, m, m)` are lost.

    What follows, `(B, n, m)`, is multiplied in place by the same (M^T M)^(-1/2). All lie on one device in one dtype.
    """
    tolerance, on_cpu = 2 * torch.finfo(ms[0].dtype).eps, ms[0].device.type == "cpu"
    left = [newton_schulz_steps(error, tolerance) for error in errors]
    here, there, active = list(ms), list(outs), list(range(len(ms)))
    while active:
        torch._foreach_copy_([there[i] for i in active], [here[i] for i in active])
        for i in active:
            m, s, v = here[i], ss[i], follow[i]
            torch.bmm(m.mT, m, out=s)
            s.diagonal(dim1=-2, dim2=-1).sub_(1)
            if v is not None:
                v.copy_(torch.baddbmm(v, v, s, alpha=-0.5))
            left[i] -= 1
            if on_cpu and left[i] and _nearly_there(s, tolerance):
                left[i] = 0
            here[i], there[i] = there[i].baddbmm_(m, s, alpha=-0.5), m
        active = [i for i in active if left[i]]
    astray = [i for i, out in enumerate(outs) if here[i] is not out]
    if astray:
        torch._foreach_copy_([outs[i] for i in astray], [here[i] for i in astray])


def _nearly_there(s: Tensor, tolerance: float) -> bool:
    """Whether the next S is rounding. No row is longer than its matrix, whose length costs less to take."""
    return any(0.75 * float(torch.linalg.vector_norm(s, dim=dim).max()) ** 2 <= tolerance for dim in ((-2, -1), -1))


def polar(m: Tensor, error: float = 0.5) -> Tensor:
    """The polar factor of each `(..., n, m)`, n >= m, in M's dtype, for |M^T M - I|_2 <= `error` < 1."""
    bank = m.reshape(-1, *m.shape[-2:]).clone()
    result = torch.empty_like(bank)
    newton_schulz([bank], [error], [m.new_empty(len(bank), m.shape[-1], m.shape[-1])], [result], [None])
    return result.view(m.shape)
