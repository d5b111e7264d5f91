"""Adapter layers into parameters and out again, beside other adapters that stay as they are.

Adapters on one weight act through one mix, W = (W0 + sum D) R^T with R_j = exp(sum A_j). A new adapter beside frozen
ones is therefore trained as R_j itself and the whole delta, which start at those of the frozen mix (and of the adapter
to go on from); in the end the new adapter is the difference,

    A_new = log R - A_frozen,    delta_new = delta - delta_frozen

Mixed with the frozen ones by `lie_sum`, all at weight 1, it gives the trained weight exactly, whatever commutes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..adapter import Layer
from ..errors import SodaTrainingError
from ..kronecker import expm_factors
from .parameters import SodaParameters

Layers = Mapping[str, Sequence[Layer]]


@torch.no_grad()
def put(parameters: SodaParameters, layers: Layers) -> None:
    """Set the parameters to those of `layers`, where these name a layer of theirs; one term each.

    Raises SodaTrainingError for a layer of another decomposition or other factor sizes.
    """
    for group in parameters.groups:
        for i, name in enumerate(group.names):
            if name not in layers:
                continue
            layer = _only(name, layers[name], group.decomposition, group.sizes)
            factors = expm_factors([log.double() for log in layer.logs], group.sizes)
            for (bank, rows), factor in zip(group.places, factors, strict=False):
                parameters.banks[bank].data[rows][i].copy_(factor)
            if group.delta is not None and layer.delta is not None:
                group.delta.data[i].copy_(layer.delta)


def _only(name: str, terms: Sequence[Layer], decomposition: str, sizes: tuple[int, ...]) -> Layer:
    forms = [_form(term) for term in terms]
    if forms != [(decomposition, sizes)]:
        have = " and ".join(f"{kind} with factors {had}" for kind, had in forms)
        raise SodaTrainingError(
            f"the adapter at hand changes {name} by {have}, this training by {decomposition} with factors {sizes}; "
            "set decomposition and factors to those of the adapter, or leave it out"
        )
    return terms[0]


def difference(total: Layers, frozen: Layers, base: Layers) -> dict[str, tuple[Layer, ...]]:
    """`total` without `frozen`, layer by layer.

    base: `total` as it was with the frozen adapters alone, whose delta and sketch are those on this very base.
    """
    found: dict[str, tuple[Layer, ...]] = {}
    for name, (layer,) in total.items():
        if name in frozen:
            (still,), (held,) = frozen[name], base[name]
            layer = replace(
                layer,
                delta=_minus(layer.delta, still.delta),
                logs=tuple(a - b for a, b in zip(layer.logs, still.logs, strict=True)),
                sketch=_minus(layer.sketch, held.sketch),
            )
        found[name] = (layer,)
    return found


def added(one: Layers, other: Layers) -> dict[str, tuple[Layer, ...]]:
    """The sum of single terms of equal form, where both name a layer, else what there is."""
    found = {name: tuple(terms) for name, terms in one.items()}
    for name, terms in other.items():
        mine = found.get(name, ())
        if len(mine) == len(terms) == 1 and _form(mine[0]) == _form(terms[0]):
            (a,), (b,) = mine, terms
            delta = a.delta if b.delta is None else b.delta if a.delta is None else a.delta + b.delta
            found[name] = (replace(a, delta=delta, logs=tuple(x + y for x, y in zip(a.logs, b.logs, strict=True))),)
        else:
            found[name] = (*mine, *terms)
    return found


def _form(layer: Layer) -> tuple[str, tuple[int, ...]]:
    return layer.decomposition, layer.sizes


def _minus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if a is None or b is None else a - b
