"""What a mix says about itself: that on which its parts agree, and what it was made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ..metadata import PICTURES
from .blocks import Weight
from .terms import Part

OF_ONE = ("soda.training", "modelspec.title", *PICTURES)  # not the mix's, even where they agree


def describe(parts: Sequence[Part], operator: str, settings: Mapping[str, float]) -> dict[str, str]:
    """Metadata: what all parts say alike; names, weights and hashes; the operator; trigger words one after the other.

    `soda.mix` is a JSON list of {name, weight, hash}, `soda.mix_operator` the JSON of {operator, settings ...}.
    """
    first, *rest = (adapter.metadata for adapter, _ in parts)
    agreed = {key: value for key, value in first.items() if all(other.get(key) == value for other in rest)}
    for key in OF_ONE:
        agreed.pop(key, None)
    triggers = dict.fromkeys(a.metadata.get("modelspec.trigger_phrase", "") for a, w in parts if heard(w))
    agreed["modelspec.trigger_phrase"] = ", ".join(word for word in triggers if word)
    agreed["modelspec.merged_from"] = ", ".join(adapter.name or "unnamed" for adapter, _ in parts)
    agreed["soda.mix"] = json.dumps([
        {"name": a.name, "weight": dict(w) if isinstance(w, Mapping) else w, "hash": a.content_hash} for a, w in parts
    ])  # fmt: skip
    agreed["soda.mix_operator"] = json.dumps({"operator": operator, **settings})
    agreed["soda.role"] = first.get("soda.role", "other") if not rest else agreed.get("soda.role", "other")
    return {key: value for key, value in agreed.items() if value}


def title(parts: Sequence[Part]) -> str:
    """adapter x weight + ..."""
    return " + ".join(f"{a.name} x {'blocks' if isinstance(w, Mapping) else format(w, 'g')}" for a, w in parts)


def heard(weight: Weight) -> bool:
    """Whether any layer has a weight."""
    return any(weight.values()) if isinstance(weight, Mapping) else bool(weight)
