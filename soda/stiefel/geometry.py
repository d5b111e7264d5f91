"""Tangent steps of St(n, m) and the way along them (Kong, Wang, Tao, "Momentum Stiefel Optimizer", ICLR 2023).

A tangent at X is X xi + zeta: xi `(m, m)` skew turns the columns among themselves, zeta `(n, m)` with X^T zeta = 0
turns them out of their span; for n = m there is no zeta. For G = dL/dX the metric tr Q^T (I - a X X^T) Q gives

    Z = (X^T G - G^T X) / (2 (1 - a))        a = 1/2, canonical; a = 0, Euclidean
    W = G - X X^T G

and a step goes to

    X1 = X tau(xi)                           the retraction's name says which tau
    X2 = X1 + zeta X1^T X1
    X3 = X2 (X2^T X2)^(-1/2)

| retraction | tau(xi)                       | an eigen-angle theta of xi turns X by | work                |
|------------|-------------------------------|---------------------------------------|---------------------|
| `polar`    | I + xi                        | atan theta                            | one product         |
| `cayley`   | (I - xi / 2)^-1 (I + xi / 2)  | 2 atan(theta / 2)                     | one solve           |
| `exp`      | exp xi                        | theta                                 | waits for the GPU   |

The momentum V of the normal part moves along: V - X1 zeta^T V, times the same (X2^T X2)^(-1/2), stays normal to X3.
The factor makes the move a rotation of (X, V) when zeta is along V, so that |V| does not grow. (The authors' program
leaves the factor out: there |V| grows by sqrt(1 + |zeta|^2), which a momentum of 0.9 damps up to |zeta| = 0.48 only.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .newton_schulz import newton_schulz
from .scratch import Scratch

MAX_STEP = 0.5


def tangent_gradients(
    xs: list[Tensor], gs: list[Tensor], a: float, scratch: Scratch
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Z `(B, m, m)` and W `(B, n, m)`, None if n = m, of the gradients G at each X `(B, n, m)`. Z lie in piece 1."""
    squares = [(len(x), x.shape[-1], x.shape[-1]) for x in xs]
    inners, zs = scratch.take(0, xs[0], squares), scratch.take(1, xs[0], squares)
    for x, g, inner, z in zip(xs, gs, inners, zs, strict=True):
        torch.bmm(x.mT, g, out=inner)
        torch.sub(inner, inner.mT, out=z)
    if a != 0.5:
        torch._foreach_mul_(zs, 0.5 / (1 - a))
    return zs, [
        None if x.shape[-2] == x.shape[-1] else torch.baddbmm(g, x, inner, alpha=-1)
        for x, g, inner in zip(xs, gs, inners, strict=True)
    ]


def largest_skew(entry: float, n: int) -> float:
    """The largest |xi|_2 of a skew xi `(n, n)` with entries of at most `entry` each (G. Pick, ZAMM 2, 1922).

    It has all of them above the diagonal alike.
    """
    return entry / math.tan(math.pi / (2 * n))


def hold(step: Tensor) -> Tensor:
    """Shorten, in place, each part xi or zeta of a step so that |step^T step|_F <= MAX_STEP^2.

    That bounds the largest singular value by MAX_STEP, where Newton-Schulz steps converge, and is much nearer to it
    than |step|_F, so that large matrices are not held back at ordinary rates.
    """
    length = torch.linalg.vector_norm(step, dim=(-2, -1), keepdim=True)
    if step.device.type == "cpu" and float(length.max()) <= MAX_STEP:
        return step
    info = torch.finfo(step.dtype)
    step.div_(length.clamp_min(info.tiny))  # first to length 1: no overflow below, however long
    gram = torch.linalg.vector_norm(torch.bmm(step.mT, step), dim=(-2, -1), keepdim=True)
    return step.mul_(torch.minimum(length, MAX_STEP / gram.sqrt_().clamp_min_(info.eps)))


def hold_skew(xi: Tensor, entry: float) -> Tensor:
    """`hold` for a skew xi with entries of at most `entry`; not computed where these are too small to be held.

    |xi^T xi|_F <= |xi|_2 |xi|_F, and |xi|_F <= sqrt(n (n - 1)) entry.
    """
    n = xi.shape[-1]
    if largest_skew(entry, n) * math.sqrt(n * (n - 1)) * entry <= MAX_STEP**2:
        return xi
    return hold(xi)


def _add(xs: list[Tensor], xis: list[Tensor], outs: list[Tensor]) -> None:
    torch._foreach_copy_(outs, xs)
    for x, xi, out in zip(xs, xis, outs, strict=True):
        out.baddbmm_(x, xi)


def _cayley(xs: list[Tensor], xis: list[Tensor], outs: list[Tensor]) -> None:
    for x, xi, out in zip(xs, xis, outs, strict=True):
        eye = torch.eye(xi.shape[-1], dtype=xi.dtype, device=xi.device)
        half = xi / 2
        torch.bmm(x, torch.linalg.solve_ex(eye - half, eye + half).result, out=out)


def _exp(xs: list[Tensor], xis: list[Tensor], outs: list[Tensor]) -> None:
    for x, xi, out in zip(xs, xis, outs, strict=True):
        # Of one matrix alone, norms of 0.005 to 0.05, torch takes too few terms: wrong by 2e-10 in fp64.
        pair = xi if len(xi) > 1 else xi.expand(2, -1, -1)
        torch.bmm(x, torch.linalg.matrix_exp(pair)[: len(xi)], out=out)


Retraction = Callable[[list[Tensor], list[Tensor], list[Tensor]], None]
RETRACTIONS: dict[str, Retraction] = {"polar": _add, "cayley": _cayley, "exp": _exp}


def move(
    xs: list[Tensor],
    xis: list[Tensor],
    zetas: list[Tensor | None],
    vs: list[Tensor | None],
    retraction: str,
    scratch: Scratch,
    entry: float = math.inf,
) -> None:
    """Each X, `(B, n, m)`, goes to X3 along a held (xi, zeta), and V along with it, both in place.

    xi may lie in piece 0; its entries are at most `entry`. X's own drift e from the manifold becomes 3/4 e^2.
    """
    m1s = scratch.take(1, xs[0], [x.shape for x in xs])
    RETRACTIONS[retraction](xs, xis, m1s)
    errors = []
    for i, (x1, zeta, v) in enumerate(zip(m1s, zetas, vs, strict=True)):
        if zeta is not None and v is not None:
            v.baddbmm_(x1, torch.bmm(zeta.mT, v), alpha=-1)
            m1s[i] = torch.baddbmm(x1, zeta, torch.bmm(x1.mT, x1))
            errors.append(2.5 * MAX_STEP**2)
        elif retraction == "polar":  # singular values of a skew xi come in pairs
            errors.append(min(MAX_STEP**2 / 2**0.5, largest_skew(entry, x1.shape[-1]) ** 2))
        else:
            errors.append(0.0)
    newton_schulz(m1s, errors, xs, vs, scratch)
