"""The balance of rotations: per factor the weighted Karcher mean on SO(n) of R_i^s, with the shares w_i / s.

    X = argmin sum_i w_i / s dist(X, R_i^s)^2      0 = V := sum_i w_i / s log(X^T R_i^s) there

s is the sum over the adapters that turn this side of the weight. For two of them X is the point w_2 / s of the way
from R_1^s to R_2^s along the geodesic; going from each mean so far to the next adapter gives a start for more, and
X <- X exp(V) ends it. lie_sum differs by the third power of the angles. A negative share has no mean.
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
FARTHEST = 3.0  # radians from mean to adapter; towards pi there is no one shortest way


def karcher(name: str, terms: Sequence[Term]) -> tuple[Layer, ...]:
    """delta by lie_sum, rotations by their mean.

    Raises SodaMixError for a weight below 0 or a sum of 0, unlike factor sizes, or rotations too far apart.
    """
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
    if len(triangles) == 1 or not triangles[0].numel():
        return weighted_sum(triangles, weights)
    n, s = factor_size(triangles[0].numel()), sum(weights)
    shares = torch.tensor(weights, dtype=torch.float64) / s
    targets = torch.linalg.matrix_exp(s * skew(torch.stack(list(triangles)), n))
    x = targets[0]
    for i in range(1, len(targets)):
        x = x @ torch.linalg.matrix_exp(shares[i] / shares[: i + 1].sum() * _way(x, targets[i]))
    for _ in range(STEPS):
        v = torch.tensordot(shares, _way(x, targets), 1)
        if v.abs().max() <= TOLERANCE:
            return triangle(log_rotation(x))
        x = x @ torch.linalg.matrix_exp(v)
    raise ArithmeticError(f"no mean of the rotations was found in {STEPS} steps")


def _way(x: Tensor, targets: Tensor) -> Tensor:
    """log(X^T R) `(..., n, n)`: the shortest way from X to R."""
    way = log_rotation(x.mT @ targets)
    angle = float(torch.linalg.matrix_norm(way, 2).max())
    if angle > FARTHEST:
        raise ArithmeticError(f"the adapters turn {angle:.2f} rad apart, half a turn, and have no one mean")
    return way
