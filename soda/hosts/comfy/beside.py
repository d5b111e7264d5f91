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
from . import bypass
from .patch import SodaWeightAdapter


def take_off(patcher: ModelPatcher, layers: Mapping[str, str]) -> dict[str, tuple[Layer, ...]]:
    """Take SODA off the `layers` (layer name -> state dict key) of a clone; returns the mix that was on them.

    Other patches, and SODA's on layers that are not trained, stay.
    """
    bypassed = bypass.installed(patcher)
    frozen = {layer: tuple(_copied(term) for term in bypassed[layer]) for layer in layers if layer in bypassed}
    bypass.take_off(patcher, frozen)
    for layer, key in layers.items():
        for entry in patcher.patches.get(key, ()):
            if isinstance(entry[1], SodaWeightAdapter) and layer in entry[1].loaded_keys:
                frozen[layer] = tuple(_copied(term.scaled(entry[0])) for term in entry[1].terms)
                patcher.patches[key] = [other for other in patcher.patches[key] if other is not entry]
        if key in patcher.patches and not patcher.patches[key]:
            del patcher.patches[key]
    if frozen:
        patcher.patches_uuid = uuid.uuid4()  # ComfyUI loads the patches anew where this differs
    return frozen


def _copied(term: Layer) -> Layer:
    delta = None if term.delta is None else term.delta.clone()
    return Layer(term.decomposition, delta, tuple(log.clone() for log in term.logs))
