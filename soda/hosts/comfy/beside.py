"""Training beside SODA adapters that are on the model already: they stay as they are, the new one is added to them.

All SODA adapters on a MODEL act through one mix, so the new one is trained as one more part of that mix
(`soda.training.layers`): applied together with those, each at the weight it has here, it does what it was trained to
do. On its own it is another adapter.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from comfy.model_patcher import ModelPatcher

from ...adapter import Layer
from .patch import SodaWeightAdapter


def take_off(patcher: ModelPatcher, layers: Mapping[str, str]) -> dict[str, tuple[Layer, ...]]:
    """Take the SODA patches of `layers` (layer name -> state dict key) off a clone; returns the mix that they carried.

    Other patches, and SODA's on layers that are not trained, stay.
    """
    frozen: dict[str, tuple[Layer, ...]] = {}
    for layer, key in layers.items():
        for entry in patcher.patches.get(key, ()):
            if isinstance(entry[1], SodaWeightAdapter) and layer in entry[1].loaded_keys:
                frozen[layer] = tuple(
                    Layer(term.decomposition, None if term.delta is None else term.delta.clone(),
                          tuple(log.clone() for log in term.logs))
                    for term in entry[1].terms
                )  # fmt: skip
                patcher.patches[key] = [other for other in patcher.patches[key] if other is not entry]
        if key in patcher.patches and not patcher.patches[key]:
            del patcher.patches[key]
    if frozen:
        patcher.patches_uuid = uuid.uuid4()  # ComfyUI loads the patches anew where this differs
    return frozen
