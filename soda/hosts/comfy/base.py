"""The unpatched base weights of a ComfyUI model, and their decompositions, computed once and kept in memory.

ComfyUI swaps patched weights into the model while it is loaded and keeps the originals in `patcher.backup`.
Decompositions are computed from those originals, batched by shape, and shared by all adapters and strengths.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from comfy.model_patcher import ModelPatcher, get_key_weight

from ...adapter import Decomposition, split_rows
from ...decomposition import Basis, decompose

CHUNK_ELEMENTS = 1 << 26  # at most 256 MiB of fp32 weights are decomposed in one batch
CACHE_BYTES = 6 << 30  # SDXL's 560 matrices in one decomposition take 3.6 GiB


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
    return weight if convert is None else convert(weight, inplace=False)


def layer_weight(patcher: ModelPatcher, layer: str) -> torch.Tensor:
    """The unpatched weight of one adapter layer, (out, in); rows a to b if the name says so."""
    key, rows = split_name(layer)
    weight = unpatched(patcher, key)
    return weight if rows is None else weight[rows[0] : rows[1]]


@dataclass
class _Entry:
    model: weakref.ref
    sample: bytes
    basis: Basis
    size: int


class BasisCache:
    """Least recently used decompositions by (model, layer, decomposition), at most `limit` bytes in all.

    An entry holds only while its model lives and a sample of the weight's numbers is unchanged.
    """

    def __init__(self, limit: int = CACHE_BYTES):
        self.limit = limit
        self.size = 0
        self._entries: OrderedDict[tuple, _Entry] = OrderedDict()

    def get(self, model: torch.nn.Module, layer: str, decomposition: Decomposition, sample: bytes) -> Basis | None:
        key = (id(model), layer, decomposition)
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.model() is not model or entry.sample != sample:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry.basis

    def put(
        self, model: torch.nn.Module, layer: str, decomposition: Decomposition, sample: bytes, basis: Basis
    ) -> None:
        for key in [k for k, e in self._entries.items() if e.model() is None]:
            self._drop(key)
        key = (id(model), layer, decomposition)
        self._drop(key)
        tensors = (basis.left, basis.right, basis.spectrum, basis.live)
        size = sum(t.numel() * t.element_size() for t in tensors if t is not None)
        self._entries[key] = _Entry(weakref.ref(model), sample, basis, size)
        self.size += size
        while self.size > self.limit and len(self._entries) > 1:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: tuple) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.size -= entry.size


CACHE = BasisCache()


def _sample(weight: torch.Tensor) -> bytes:
    """A digest of shape, dtype and some thousand evenly spaced numbers: tells a changed weight from the same one."""
    flat = weight.reshape(-1)
    numbers = flat[:: max(1, flat.numel() // 1024)].to(device="cpu", dtype=torch.float64)
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}".encode())
    digest.update(numbers.numpy().tobytes())
    return digest.digest()


def _pick(basis: Basis, index: int) -> Basis:
    """One matrix's basis out of a batch, on the CPU."""

    def take(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[index].cpu().contiguous()

    return Basis(basis.decomposition, take(basis.left), take(basis.right), take(basis.spectrum), take(basis.live))


def bases(
    patcher: ModelPatcher, wanted: Iterable[tuple[str, Decomposition]], cache: BasisCache = CACHE
) -> dict[tuple[str, Decomposition], Basis]:
    """(layer, decomposition) -> Basis of the unpatched weight, CPU fp32, from the cache or computed now.

    Missing ones are decomposed in batches of one shape, on the model's own device when that is a CUDA GPU.
    """
    found: dict[tuple[str, Decomposition], Basis] = {}
    missing: dict[tuple, list[tuple[str, torch.Tensor, bytes]]] = defaultdict(list)
    for layer, decomposition in wanted:
        if decomposition == "none" or (layer, decomposition) in found:
            continue
        weight = layer_weight(patcher, layer)
        sample = _sample(weight)
        basis = cache.get(patcher.model, layer, decomposition, sample)
        if basis is None:
            missing[decomposition, tuple(weight.shape)].append((layer, weight, sample))
        else:
            found[layer, decomposition] = basis
    device = patcher.load_device if patcher.load_device.type == "cuda" else torch.device("cpu")
    for (decomposition, shape), group in missing.items():
        count = max(1, CHUNK_ELEMENTS // (shape[0] * shape[1]))
        for start in range(0, len(group), count):
            chunk = group[start : start + count]
            stack = torch.stack([weight.to(device=device, dtype=torch.float32) for _, weight, _ in chunk])
            batch = decompose(stack, decomposition)
            for index, (layer, _, sample) in enumerate(chunk):
                basis = _pick(batch, index)
                cache.put(patcher.model, layer, decomposition, sample, basis)
                found[layer, decomposition] = basis
    return found
