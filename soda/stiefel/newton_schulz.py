"""The polar factor M (M^T M)^(-1/2), the nearest matrix with orthonormal columns, by Newton-Schulz steps.

With S = M^T M - I a step is M <- M (I - T / 2):

    order 1    T = S              S becomes -3/4 S^2 + 1/4 S^3                      two products
    order 2    T = S - 3/4 S^2    S becomes  5/8 S^3 - 15/64 S^4 + 9/64 S^5         three products

They converge for eigenvalues of S in (-1, 2) and (-1, 4/3). There is no normalisation first: the matrices of an
optimizer's step are near the manifold, where one or two steps reach rounding. A step is of order 2 where that ends the
steps and order 1 does not: then no other steps need fewer products.

A step along the manifold makes S = xi^T xi >= 0, whose eigenvalues lie around c > 0. M / sqrt(1 + c) has M's polar
factor, and its own S is (S - c I) / (1 + c), shorter than S. So the same steps shrink that:

    M <- M (I - T / 2) / sqrt(1 + c),    T from (S - c I) / (1 + c) in place of S

Any c >= 0 keeps eigenvalues of S in (-1, 1) inside what converges.

A bound on |S|_2 says how many steps may be needed. On a CPU S is looked at where that is more than one of order 1: its
length bounds |S|_2. If that is too long as well, c becomes the middle of the diagonals of a bank, and the squared
length of the longest row of (S - c I) / (1 + c) bounds the entries of its square. On other devices a look would wait
for the device, and c is 0. (Higham, Functions of Matrices, 2008, section 8.3.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scratch import Scratch


def shrinkage(order: int, error: float) -> float:
    """c such that a step of this order turns S, |S|_2 <= `error`, into at most c S^2, in norm and entry by entry."""
    return 0.75 + 0.25 * error if order == 1 else error * (5 / 8 + error * (15 / 64 + error * 9 / 64))


def newton_schulz(
    ms: list[Tensor], errors: list[float], outs: list[Tensor], follow: list[Tensor | None], scratch: Scratch
) -> None:
    """Each `out` becomes the polar factor of its M `(B, n, m)` with |S|_2 <= `error`; M, perhaps in piece 1, is lost.

    What follows, `(B, n, m)`, is multiplied in place by the same (M^T M)^(-1/2). All lie on one device in one dtype.
    """
    tolerance = 2 * torch.finfo(ms[0].dtype).eps
    squares = [(len(m), m.shape[-1], m.shape[-1]) for m in ms]
    ss = scratch.take(0, ms[0], squares)
    errors, scales, here, there, active = list(errors), [1.0] * len(ms), list(ms), list(outs), list(range(len(ms)))
    while active:
        ts, second, unfinished = list(ss), [], []
        for i in active:
            torch.bmm(here[i].mT, here[i], out=ss[i])
            ss[i].diagonal(dim1=-2, dim2=-1).sub_(1)
            scales[i], row, error = _centre(ss[i], errors[i], tolerance)
            first_left, second_left = (shrinkage(order, error) * row**2 for order in (1, 2))
            if first_left > tolerance >= second_left:
                second.append(i)
            elif first_left > tolerance:
                unfinished.append(i)
                errors[i] = shrinkage(1, error) * error**2
        if second:
            pieces = scratch.take(2, ms[0], squares)
            torch._foreach_copy_([pieces[i] for i in second], [ss[i] for i in second])
            for i in second:
                ts[i] = pieces[i].baddbmm_(ss[i], ss[i], alpha=-0.75 / scales[i])
        torch._foreach_copy_([there[i] for i in active], [here[i] for i in active])
        for i in active:
            v, beta, alpha = follow[i], scales[i] ** -0.5, -0.5 * scales[i] ** -1.5
            if v is not None:
                v.copy_(torch.baddbmm(v, v, ts[i], beta=beta, alpha=alpha))
            here[i], there[i] = there[i].baddbmm_(here[i], ts[i], beta=beta, alpha=alpha), here[i]
        active = unfinished
    astray = [i for i, out in enumerate(outs) if here[i] is not out]
    if astray:
        torch._foreach_copy_([outs[i] for i in astray], [here[i] for i in astray])


def _centre(s: Tensor, error: float, tolerance: float) -> tuple[float, float, float]:
    """S becomes S - c I; returns 1 + c, and bounds on the rows of (S - c I) / (1 + c) and on its |.|_2.

    c is 0 where `error`, or the length of S, which costs less to take than rows, says that order 1 is enough.
    """
    if s.device.type != "cpu" or shrinkage(1, error) * error**2 <= tolerance:
        return 1.0, error, error
    error = min(error, float(torch.linalg.vector_norm(s, dim=(-2, -1)).max()))
    if shrinkage(1, error) * error**2 <= tolerance:
        return 1.0, error, error
    diagonals = s.diagonal(dim1=-2, dim2=-1)
    low, high = torch.aminmax(diagonals)
    c = max(0.0, float(low + high) / 2)
    diagonals.sub_(c)
    rows = torch.linalg.vector_norm(s, dim=-1)
    error = min(error + c, float(torch.linalg.vector_norm(rows, dim=-1).max())) / (1 + c)
    return 1 + c, min(error, float(rows.max()) / (1 + c)), error


def polar(m: Tensor, error: float = 0.5) -> Tensor:
    """The polar factor of each `(..., n, m)`, n >= m, in M's dtype, for |M^T M - I|_2 <= `error` < 1."""
    bank = m.reshape(-1, *m.shape[-2:]).clone()
    result = torch.empty_like(bank)
    newton_schulz([bank], [error], [result], [None], Scratch())
    return result.view(m.shape)
