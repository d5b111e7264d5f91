"""Mixing adapters in the Lie algebra: delta = sum w_i delta_i, A_j = sum w_i A_ij.

| kept by the mix | |
|---|---|
| identity | all weights 0 is the base, bit for bit |
| exact recovery | one adapter at weight 1 (others at 0) is that adapter |
| any order | the sums run in fp64 in the order of content hashes: a permutation changes no bit |
| orthogonality | the factors are exp of a skew matrix for any weights |
| size | adapters of one form mix to one adapter of the same size |

Terms of unlike decompositions or factor sizes stay side by side in the layer: `adapt` applies them as
`(W0 + sum w_i D_i) R^T`, with R from all of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import Tensor

from .adapter import Adapter, Layer
from .errors import SodaMixError

Part = tuple[Adapter, float]


def mix(parts: Sequence[Part], name: str = "") -> Adapter:
    """The weighted sum of adapters as one adapter; a single adapter at weight 1 is returned as it is.

    Raises SodaMixError if there is nothing to mix, a weight is not finite, or spectra differ in length.
    """
    if not parts:
        raise SodaMixError("there is no adapter to mix; give at least one")
    for adapter, weight in parts:
        if not abs(weight) < float("inf"):
            raise SodaMixError(f"the weight of {adapter.name!r} is {weight}; give a finite number")
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    # A part of weight 0 has no say in the form either, unless there is no other.
    ordered = sorted([part for part in parts if part[1]] or parts, key=lambda part: (part[0].content_hash, part[1]))
    groups: dict[str, dict[tuple, list[tuple[Layer, float]]]] = {}
    for adapter, weight in ordered:
        for layer, terms in adapter.layers.items():
            for term in terms:
                groups.setdefault(layer, {}).setdefault((term.decomposition, term.sizes), []).append((term, weight))
    layers = {
        layer: tuple(_sum(layer, forms[form]) for form in sorted(forms)) for layer, forms in sorted(groups.items())
    }
    return Adapter(layers, _metadata(parts), name or " + ".join(f"{a.name} x {w:g}" for a, w in parts))


def _sum(name: str, terms: Sequence[tuple[Layer, float]]) -> Layer:
    """The weighted sum of layers of one form, in the order given."""
    lengths = {term.delta.numel() for term, _ in terms if term.delta is not None}
    if len(lengths) > 1:
        raise SodaMixError(
            f"layer {name!r}: spectra of {' and '.join(map(str, sorted(lengths)))} numbers do not mix; they belong to "
            "models of unlike architecture"
        )

    def total(tensors: Sequence[Tensor | None]) -> Tensor | None:
        known = [(t.double(), w) for t, (_, w) in zip(tensors, terms, strict=True) if t is not None]
        if len(known) < len(terms):
            return None
        return sum((t * w for t, w in known[1:]), known[0][0] * known[0][1]).float()

    first = terms[0][0]
    return Layer(
        first.decomposition,
        total([layer.delta for layer, _ in terms]),
        tuple(total([layer.logs[j] for layer, _ in terms]) for j in range(len(first.logs))),
        total([layer.sketch for layer, _ in terms]),
    )


def _metadata(parts: Sequence[Part]) -> dict[str, str]:
    """What the parts say, where they agree; their names and weights; their trigger words one after the other."""
    first, *rest = (adapter.metadata for adapter, _ in parts)
    agreed = {key: value for key, value in first.items() if all(other.get(key) == value for other in rest)}
    for key in ("soda.training", "modelspec.thumbnail", "modelspec.title"):
        agreed.pop(key, None)
    triggers = dict.fromkeys(a.metadata.get("modelspec.trigger_phrase", "") for a, w in parts if w)
    agreed["modelspec.trigger_phrase"] = ", ".join(word for word in triggers if word)
    agreed["modelspec.merged_from"] = ", ".join(adapter.name or "unnamed" for adapter, _ in parts)
    agreed["soda.mix"] = json.dumps([{"name": a.name, "weight": w, "hash": a.content_hash} for a, w in parts])
    agreed["soda.role"] = first.get("soda.role", "other") if not rest else agreed.get("soda.role", "other")
    return {key: value for key, value in agreed.items() if value}

