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

from collections.abc import Callable

import torch
from torch import Tensor

from .newton_schulz import newton_schulz
from .scratch import Scratch

MAX_STEP = 0.5


def tangent_gradient(x: Tensor, g: Tensor, a: float, scratch: Scratch) -> tuple[Tensor, Tensor | None]:
    """Z `(B, m, m)` and W `(B, n, m)`, None if n = m, of the gradients G at X `(B, n, m)`. Z lies in piece 1."""
    square = len(x), x.shape[-1], x.shape[-1]
    inner = torch.bmm(x.mT, g, out=scratch.take(0, x, *square))
    z = torch.sub(inner, inner.mT, out=scratch.take(1, x, *square))
    if a != 0.5:
        z.mul_(0.5 / (1 - a))
    return z, None if x.shape[-2] == x.shape[-1] else torch.baddbmm(g, x, inner, alpha=-1)


def hold(step: Tensor) -> Tensor:
    """Shorten, in place, each part xi or zeta of a step so that |step^T step|_F <= MAX_STEP^2.

    That bounds the largest singular value by MAX_STEP, where Newton-Schulz steps converge, and is much nearer to it
    than |step|_F, so that large matrices are not held back at ordinary rates.
    """
    length = torch.linalg.vector_norm(step, dim=(-2, -1), keepdim=True)
    if step.device.type == "cpu" and bool((length <= MAX_STEP).all()):
        return step
    info = torch.finfo(step.dtype)
    step.div_(length.clamp_min(info.tiny))  # first to length 1: no overflow below, however long
    gram = torch.linalg.vector_norm(torch.bmm(step.mT, step), dim=(-2, -1), keepdim=True)
    return step.mul_(torch.minimum(length, MAX_STEP / gram.sqrt_().clamp_min_(info.eps)))


def _add(x: Tensor, xi: Tensor, out: Tensor) -> Tensor:
    return torch.baddbmm(x, x, xi, out=out)


def _cayley(x: Tensor, xi: Tensor, out: Tensor) -> Tensor:
    eye = torch.eye(xi.shape[-1], dtype=xi.dtype, device=xi.device)
    half = xi / 2
    return torch.bmm(x, torch.linalg.solve_ex(eye - half, eye + half).result, out=out)


def _exp(x: Tensor, xi: Tensor, out: Tensor) -> Tensor:
    # Of one matrix alone, norms of 0.005 to 0.05, torch takes too few terms: wrong by 2e-10 in fp64.
    pair = xi if len(xi) > 1 else xi.expand(2, -1, -1)
    return torch.bmm(x, torch.linalg.matrix_exp(pair)[: len(xi)], out=out)


RETRACTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"polar": _add, "cayley": _cayley, "exp": _exp}


def move(x: Tensor, xi: Tensor, zeta: Tensor | None, v: Tensor | None, retraction: str, scratch: Scratch) -> None:
    """X, `(B, n, m)`, goes to X3 along a held (xi, zeta), and V along with it, both in place; xi may lie in piece 0.

    X's own drift from the manifold goes away on the way.
    """
    x1 = RETRACTIONS[retraction](x, xi, scratch.take(1, x, *x.shape))
    s = scratch.take(0, x, len(x), x.shape[-1], x.shape[-1])
    if zeta is None or v is None:
        newton_schulz(x1, MAX_STEP**2 / 2**0.5, s, out=x)  # singular values of a skew xi come in pairs
        return
    x2 = torch.baddbmm(x1, zeta, torch.bmm(x1.mT, x1))
    v.baddbmm_(x1, torch.bmm(zeta.mT, v), alpha=-1)
    newton_schulz(x2, 2.5 * MAX_STEP**2, s, out=x, follow=v)
