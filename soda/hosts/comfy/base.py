"""The unpatched base weights of a ComfyUI model, and their decompositions, computed once and kept in memory.

ComfyUI swaps patched weights into the model while it is loaded and keeps the originals in `patcher.backup`.
Decompositions are computed from those originals and shared by all adapters and strengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from comfy.model_patcher import ModelPatcher, get_key_weight
from comfy.utils import get_attr

from ...adapter import Decomposition, split_rows
from ...basis_cache import BasisCache
from ...decomposition import Basis
from .quantised import dequantised_gguf, is_gguf

CACHE = BasisCache()


def split_name(layer: str) -> tuple[str, tuple[int, int] | None]:
    """`path` or `path[a:b]` -> (state dict key, rows a to b of a fused weight or None)."""
    path, rows = split_rows(layer)
    return f"{path}.weight", rows


def unpatched(patcher: ModelPatcher, key: str) -> torch.Tensor:
    """The base weight of `key`, whatever patches or hooks are loaded now; on its own device, in its own dtype.

    A quantised weight is returned dequantised. The result may share memory with the model: read only.
    """
    weight, _, convert = get_key_weight(patcher.model, key)
    if key in patcher.backup:
        weight = patcher.backup[key].weight
    if key in patcher.hook_backup:
        weight = patcher.hook_backup[key][0]
    if is_gguf(weight):
        return dequantised_gguf(get_attr(patcher.model, key.rsplit(".", 1)[0]), weight)
    return weight if convert is None else convert(weight, inplace=False)


def matrix_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """(out, in) of a 1 x 1 convolution's weight (out, in, 1, ...); any other shape as it is."""
    return tuple(shape[:2]) if all(size == 1 for size in shape[2:]) else tuple(shape)


def layer_weight(patcher: ModelPatcher, layer: str) -> torch.Tensor:
    """The unpatched weight of one adapter layer, (out, in); rows a to b if the name says so."""
    key, rows = split_name(layer)
    weight = unpatched(patcher, key)
    weight = weight.reshape(matrix_shape(weight.shape))
    return weight if rows is None else weight[rows[0] : rows[1]]


def bases(
    patcher: ModelPatcher, wanted: Iterable[tuple[str, Decomposition]], cache: BasisCache = CACHE
) -> dict[tuple[str, Decomposition], Basis]:
    """(layer, decomposition) -> Basis of the unpatched weight, CPU fp32, from the cache or computed now."""
    layers: dict[Decomposition, dict[str, torch.Tensor]] = {}
    for layer, decomposition in wanted:
        layers.setdefault(decomposition, {}).setdefault(layer, layer_weight(patcher, layer))
    return {
        (layer, decomposition): basis
        for decomposition, weights in layers.items()
        for layer, basis in cache.bases(weights, decomposition, owner=patcher.model, device=patcher.load_device)
    }
