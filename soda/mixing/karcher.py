"""The balance of rotations: per factor the weighted Karcher mean on SO(n) of R_i^s, with the shares w_i / s.

    X = argmin sum_i w_i / s dist(X, R_i^s)^2      0 = V := sum_i w_i / s log(X^T R_i^s) there

For two adapters it is the point w_2 / s of the way from R_1^s to R_2^s along the geodesic. Found by the fixed point
X <- X exp(V) from lie_sum, exp(sum w_i A_i), which is X itself where the A_i commute; the two differ by the third
power of the angles. A negative share has no mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapter import Layer, factor_size
from ..errors import SodaMixError
from ..kronecker import log_rotation, skew, triangle
from .terms import Term, combine, common_turn, weighted_sum

TOLERANCE = 1e-11  # radians in V
STEPS = 100
FARTHEST = 3.0  # radians between mean and adapter; towards pi the shortest way between them is not unique


def karcher(name: str, terms: Sequence[Term]) -> tuple[Layer, ...]:
    """Raises SodaMixError for a weight below 0 or a sum of 0, unlike factor sizes, or turns too far apart."""
    common_turn(name, terms, "karcher")
    if min(term.weight for term in terms) < 0 or not any(term.weight for term in terms):
        weights = ", ".join(f"{term.weight:g}" for term in terms)
        raise SodaMixError(
            f"layer {name!r}: karcher balances adapters by their shares of a whole, which the weights {weights} do not "
            "make; give weights of 0 or more that are not all 0, or mix with lie_sum"
        )
    try:
        return combine(name, terms, weighted_sum, karcher_mean)
    except ArithmeticError as error:
        raise SodaMixError(f"layer {name!r}: {error}; lower the weights or mix with lie_sum") from None


def karcher_mean(triangles: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The triangle of log X from those of A_i, fp64, all w_i > 0. Raises ArithmeticError if there is no one mean."""
    start = weighted_sum(triangles, weights)
    n = factor_size(start.numel())
    if len(triangles) == 1 or n <= 2:
        return start
    total = sum(weights)
    a = skew(torch.stack(list(triangles)), n)
    shares = torch.tensor(weights, dtype=a.dtype)[:, None, None] / total
    targets = torch.linalg.matrix_exp(total * a)
    x = torch.linalg.matrix_exp(skew(start, n))
    for step in range(STEPS):
        away = log_rotation(x.mT @ targets)
        v = (shares * away).sum(0)
        if v.abs().max() <= TOLERANCE:
            if torch.linalg.matrix_norm(away, 2).max() > FARTHEST:
                break
            return triangle(log_rotation(x)) if step else start
        x = x @ torch.linalg.matrix_exp(v)
    raise ArithmeticError("the adapters turn in nearly opposite directions and have no one mean")
