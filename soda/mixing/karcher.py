"""The balance of rotations: per factor the weighted Karcher mean on SO(n) of R_i^s, with the shares w_i / s.

    X = argmin sum_i w_i / s dist(X, R_i^s)^2      0 = V := sum_i w_i / s log(X^T R_i^s) there

s is the sum over the adapters that turn this side of the weight. Two of them have X at the point w_2 / s of the way
from R_1^s to R_2^s along the geodesic; going from each mean so far to the next adapter gives a start for more, and
X <- X exp(V) ends it. lie_sum differs by the third power of the angles. A negative share has no mean.

Factors of one size and number of adapters are solved together, over all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..adapter import Layer
from ..errors import SodaMixError
from ..kronecker import log_rotation, skew, triangle, widest_angle
from .terms import Term, TermsByLayer, Turn, combine, common_turn, each_factor, turns, weighted_sum

TOLERANCE = 1e-11  # radians in V
STEPS = 100
FARTHEST = 3.0  # radians from mean to adapter; towards pi there is no one shortest way

Place = tuple[str, Turn, int]  # layer, side and sizes, factor


def karcher(layers: TermsByLayer) -> dict[str, tuple[Layer, ...]]:
    """delta by lie_sum, rotations by their mean.

    Raises SodaMixError for a weight below 0 or a sum of 0, unlike factor sizes, or rotations too far apart.
    """
    alike: dict[tuple[int, int], dict[Place, list[Term]]] = {}
    for name, terms in layers.items():
        common_turn(name, terms, "karcher")
        _check_shares(name, terms)
        for turn, turning in turns(terms).items():
            for j, n in enumerate(turn[1]):
                if len(turning) > 1 and n > 1:
                    alike.setdefault((n, len(turning)), {})[name, turn, j] = turning
    means: dict[Place, Tensor] = {}
    for (n, _), places in alike.items():
        means.update(zip(places, _means(places, n), strict=True))
    return {name: combine(name, terms, weighted_sum, partial(_turned, means, name)) for name, terms in layers.items()}


def _check_shares(name: str, terms: Sequence[Term]) -> None:
    if min(term.weight for term in terms) < 0 or not any(term.weight for term in terms):
        weights = ", ".join(f"{term.weight:g}" for term in terms)
        raise SodaMixError(
            f"layer {name!r}: karcher balances adapters by their shares of a whole, which the weights {weights} do not "
            "make; give weights of 0 or more that are not all 0, or mix with lie_sum"
        )


def _turned(means: Mapping[Place, Tensor], name: str, turning: Sequence[Term], j: int) -> Tensor:
    """The mean where there is one to find, else what turns alone."""
    mean = means.get((name, (turning[0].layer.side, turning[0].layer.sizes), j))
    return each_factor(weighted_sum)(turning, j) if mean is None else mean


def _means(places: Mapping[Place, Sequence[Term]], n: int) -> Tensor:
    """The triangles of log X `(B, n (n - 1) / 2)`, fp32, of B places where equally many adapters turn by SO(n)."""
    names = [name for name, _, _ in places]
    weights = torch.tensor([[term.weight for term in turning] for turning in places.values()], dtype=torch.float64)
    triangles = [torch.stack([term.layer.logs[j] for term in turning]) for (_, _, j), turning in places.items()]
    s = weights.sum(1)
    shares = weights / s[:, None]
    targets = torch.linalg.matrix_exp(s[:, None, None, None] * skew(torch.stack(triangles).double(), n))
    x = targets[:, 0].clone()
    for i in range(1, targets.shape[1]):
        part = shares[:, i] / shares[:, : i + 1].sum(1)
        x = x @ torch.linalg.matrix_exp(part[:, None, None] * _ways(x[:, None], targets[:, i : i + 1], names)[:, 0])
    if targets.shape[1] > 2:
        _settle(x, targets, shares, names)
    return triangle(log_rotation(x)).float()


def _settle(x: Tensor, targets: Tensor, shares: Tensor, names: Sequence[str]) -> None:
    """X <- X exp(V), in place, for those of the X `(B, n, n)` whose V is not yet 0."""
    moving = torch.arange(len(x))
    for _ in range(STEPS):
        ways = _ways(x[moving, None], targets[moving], [names[i] for i in moving.tolist()])
        v = (shares[moving, :, None, None] * ways).sum(1)
        far = v.abs().amax((1, 2)) > TOLERANCE
        moving = moving[far]
        if not len(moving):
            return
        x[moving] = x[moving] @ torch.linalg.matrix_exp(v[far])
    raise _refusal(names[int(moving[0])], f"no mean of the rotations was found in {STEPS} steps")


def _ways(x: Tensor, targets: Tensor, names: Sequence[str]) -> Tensor:
    """log(X^T R), the shortest ways `(B, k, n, n)` from X `(B, 1, n, n)` to R `(B, k, n, n)`."""
    turned = x.mT @ targets
    angles = widest_angle(turned).amax(1)
    worst = int(angles.argmax())
    if angles[worst] > FARTHEST:
        raise _refusal(
            names[worst], f"the adapters turn {angles[worst]:.2f} rad apart, half a turn, and have no one mean"
        )
    return log_rotation(turned)


def _refusal(name: str, why: str) -> SodaMixError:
    return SodaMixError(f"layer {name!r}: {why}; lower the weights or mix with lie_sum")
