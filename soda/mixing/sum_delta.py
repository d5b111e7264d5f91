"""The plain sum of weight changes, W = W0 + sum w_i (W_i - W0), as the paper's authors mix.

It fits adapters of any form, and keeps neither the singular values nor the norm: two rotations of 0.6 rad per factor
distort the former by some 10 %. The result is a full weight, which no SODA file can hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..adapt import adapt
from ..adapter import Decomposition
from ..decomposition import Basis
from .blocks import check_weight, layer_weight
from .terms import Part


def sum_delta(weight: Tensor, layer: str, parts: Sequence[Part], bases: Mapping[Decomposition, Basis]) -> Tensor:
    """The mixed weight `(out, in)` of one layer, fp32 (fp64 for an fp64 weight), on the weight's device.

    Summed in fp64 in the order of content hashes. If no part changes anything, the weight itself is returned.
    Raises SodaMixError for a weight that `mix` would refuse, or a term that does not fit.
    """
    found = []
    for adapter, given in parts:
        check_weight(adapter, given)
        w = layer_weight(given, layer)
        adapted = adapt(weight, adapter.layers.get(layer, ()), bases) if w else weight
        if adapted is not weight:
            found.append((adapter.content_hash, w, adapted))
    if not found:
        return weight
    found.sort(key=lambda part: part[:2])
    # Of W0 there is 1 - sum w_i, so that one adapter at weight 1 is that adapter to the last bit.
    total = weight.double() * (1 - sum(w for _, w, _ in found))
    for _, w, adapted in found:
        total = total + w * adapted.double()
    return total.to(found[0][2])
