"""SODA files through ComfyUI's own *Load LoRA* and whatever else is built on `comfy.lora.load_lora`.

There an adapter class is asked, name by name, for what a file's tensors have for it, and later meets each weight as
the patches before it left it: it knows neither the model nor what came before. So, for each layer:

- the rotation always applies;
- the spectrum applies where D on the weight at hand is what it was in training, by the file's sketch; then that is
  the untouched weight, or near enough. Its basis is computed when the weight is met first, and kept with those of
  SODA Loader;
- else only the rotation applies, and the log says so once, with the remedy.

Hooks (*Create Hook LoRA*, keyframes) do hand over the untouched weight: there all of the file applies to it whatever
came before, and the difference that it makes is added.

Alone on a model, or before its LoRAs, a file does the same here as in SODA Loader.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import comfy.weight_adapter
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...adapt import Spectrum, adapt, compressed_change
from ...adapter import Decomposition, Layer, split_rows
from ...bases import decompose_all, to_keep
from ...content import samples, weight_hash
from ...decomposition import KEPT_DTYPE, Basis, Key
from ...errors import SodaMixError
from ...file import NAME, read_layer
from ...fit import REFUSED_ERROR, SILENT_ERROR, rotation_only, spectrum_error
from ...kronecker import compact, expm_factors, rotate_compact
from ...precision import CPU
from .base import CACHE, bounded_cache, matrix_shape
from .pinned import vectors_on_device

log = logging.getLogger(__name__)
REMEDY = "SODA Loader applies all of it"
Rows = tuple[int, int] | None
BASES = 2  # kept for each weight that is met here: of two models
_kept: dict[tuple[str, torch.Size, Decomposition], list[Key]] = {}


def register() -> None:
    """Offer the class to all of ComfyUI's LoRA loaders; safe to call again."""
    if not any(known.__name__ == StockAdapter.__name__ for known in comfy.weight_adapter.adapters):
        comfy.weight_adapter.adapters.append(StockAdapter)


class StockAdapter(WeightAdapterBase):
    """What one file has for one weight.

    `weights` is (file, ((rows, decomposition, delta, logs, sketch) ...), met). Core copies the tensors among these to a
    device and rebuilds the object as type(a)(loaded_keys, weights); what is no tensor it hands on.
    """

    name = "soda"

    def __init__(self, loaded_keys: set[str], weights: tuple):
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def load(
        cls, x: str, lora: Mapping[str, Tensor], alpha: float | None, dora_scale: Tensor | None,
        loaded_keys: set[str] | None = None,
    ) -> StockAdapter | None:  # fmt: skip
        """What the tensors of a file have for the name `x` of core's key map; None if nothing.

        Text encoders' names have a prefix there that they lack in the file. Raises SodaFileError for a damaged layer.
        """
        if NAME.fullmatch(next(iter(lora), "")) is None:  # one look at a LoRA, which may have thousands of names
            return None
        file = _File.of(lora)
        path = x.removeprefix("text_encoders.")
        if path not in file.layers:
            return None
        return cls(file.keys[path], (file, tuple(
            (rows, layer.decomposition, layer.delta, layer.logs, layer.sketch)
            for rows, layer in file.layers[path].items()
        ), file.met()))  # fmt: skip

    def layers(self, device: torch.device, strength: float) -> list[tuple[Rows, Layer]]:
        """The layers of this weight by rows, at a strength."""

        def here(tensor: Any) -> Any:  # a tensor or None
            return None if tensor is None else tensor.to(device)

        return [
            (rows, Layer(decomposition, here(delta), tuple(here(log) for log in logs), here(sketch)).scaled(strength))
            for rows, decomposition, delta, logs, sketch in self.weights[1]
        ]

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, intermediate_dtype=torch.float32,
        original_weight=None,
    ):  # fmt: skip
        """Write the adapted weight into `weight`, (out, in) or (out, in, 1, 1), any dtype, and return it; fp32
        arithmetic. `original_weight` is {key: [(untouched weight, how to unpack it), patches ...]}, from hooks alone.
        Raises SodaMixError if the file is for another shape."""
        matrix = weight.reshape(matrix_shape(weight.shape))
        file, _, met = self.weights
        adapted = matrix.to(torch.float32, copy=True)
        untouched = matrix
        if original_weight is not None:
            stored, unpack = original_weight[key][0]
            untouched = unpack(stored.to(weight.device), inplace=False).reshape(matrix.shape)
        for rows, layer in self.layers(weight.device, 1.0):
            place = slice(None) if rows is None else slice(*rows)
            base = untouched[place].float()
            where = key if rows is None else f"{key}{list(rows)}"
            layer, basis = file.fitting(layer, base, where, met, matrix.dtype)
            new = _adapted(base, layer, basis, strength)
            if original_weight is None:
                adapted[place] = new
            else:
                adapted[place] += new - base
        return weight.copy_(adapted.reshape(weight.shape))

    def bypass_forward(self, org_forward, x: Tensor, *args, **kwargs) -> Tensor:
        """x (W R^T)^T + b = (x R) W^T + b: the rotation, without a look at the weight.

        Each layer in a fused weight takes a forward of its own. Raises SodaMixError for qr, which turns outputs, and
        for convolutions.
        """
        self.weights[0].tell("in bypass mode")
        result: Any = None
        for rows, back in self._back(x):
            out = org_forward(rotate_compact(x.flatten(0, -2), back).reshape(x.shape), *args, **kwargs)
            if rows is None:
                return out
            result = org_forward(x, *args, **kwargs) if result is None else result
            result[..., slice(*rows)] = out[..., slice(*rows)]
        return result

    def _back(self, x: Tensor) -> list[tuple[Rows, list[Tensor]]]:
        """The factors of R^T (x R is the rotation backwards) by rows, like x; made once, for core tells an adapter its
        strength when it is put on."""
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] != (x.device, x.dtype, self.multiplier):
            found = []
            for rows, layer in self.layers(CPU, self.multiplier):
                if layer.side == "output" or self.is_conv:
                    raise SodaMixError(f"bypass mode has no rotation of outputs and of convolutions; {REMEDY}")
                factors = expm_factors([-log.double() for log in layer.logs], layer.sizes)
                found.append((rows, [part.to(x) for part in compact(factors, x.device)]))
            self._kept = kept = ((x.device, x.dtype, self.multiplier), found)
        return kept[1]


@dataclass(eq=False)
class _Met:
    """The weights that the adapters of one file have met, by sample; lives as long as these."""

    def __post_init__(self) -> None:
        # With the basis, where the user's settings leave no memory for it and it is asked for in every forward.
        self.bases: dict[str, Basis | None] = {}


@dataclass(eq=False)
class _File:
    """The layers of one file by the weight's path and rows, and what has been said about it."""

    tensors: Mapping[str, Tensor]
    last: ClassVar[_File | None] = None

    def __post_init__(self) -> None:
        self._met: Callable[[], _Met | None] = lambda: None
        self.keys: dict[str, set[str]] = {}
        self.layers: dict[str, dict[Rows, Layer]] = {}
        self.told = False
        self.unfit: set[str] = set()  # samples of weights that the spectrum does not fit: decomposed once, not again
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            name, _, part = key.rpartition(".soda_")
            if name:
                parts.setdefault(name, {})[part] = tensor.float()
                self.keys.setdefault(split_rows(name)[0], set()).add(key)
        for name in sorted(parts):
            path, rows = split_rows(name)
            self.layers.setdefault(path, {})[rows] = read_layer("the SODA file", name, parts[name])
        self.bytes = sum(_basis_bytes(layer) for layers in self.layers.values() for layer in layers.values())

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> _File:
        """Read once, for core asks name by name."""
        if cls.last is None or cls.last.tensors is not tensors:
            bounded_cache()
            cls.last = cls(tensors)
        return cls.last

    def met(self) -> _Met:
        """What the adapters made of it share."""
        met = self._met() or _Met()
        self._met = weakref.ref(met)
        return met

    def fitting(
        self, layer: Layer, weight: Tensor, key: str, met: _Met, dtype: torch.dtype
    ) -> tuple[Layer, dict[str, Basis]]:
        """(the layer, or its rotation alone; the basis it needs) on an fp32 weight (out, in) that came in `dtype`."""
        if layer.delta is None or layer.is_zero():
            return layer, {}
        (seen,) = samples([weight])
        if seen in self.unfit:
            return rotation_only({"": (layer,)})[""][0], {}
        again, basis = seen in met.bases, met.bases.get(seen)
        if basis is None:
            cached: Key = (_hash(weight, seen), layer.decomposition)
            basis = CACHE.get(cached, weight.shape)
            computed = _computed(weight, layer.decomposition) if basis is None else basis
            error = 0.0 if again else _error(layer, computed)
            if error > REFUSED_ERROR:
                self.tell(f"where its spectrum would be off by about {error:.0%} ({key}), likely behind another patch")
                self.unfit.add(seen)
                return rotation_only({"": (layer,)})[""][0], {}
            kept = self.bytes <= CACHE.memory
            if basis is None and kept:
                _keep((key, weight.shape), cached, computed, to_disk=not again and error < SILENT_ERROR)
            basis = computed
            met.bases[seen] = basis if again and not kept and not _merging(weight, dtype) else None
        left, right = vectors_on_device(basis, weight.device, again=True)
        near = replace(basis, left=left, right=right, live=basis.live.to(weight.device))
        return layer, {layer.decomposition: near}

    def tell(self, where: str) -> None:
        if not self.told:
            log.warning("Of a SODA file only the rotation is applied %s. %s.", where, REMEDY)
        self.told = True


@lru_cache(maxsize=1 << 14)
def _known(seen: str) -> list[str]:
    """A place for the hash of the weight with this sample: hashing takes longer than adapting."""
    return []


def _hash(weight: Tensor, seen: str) -> str:
    """That of a weight (out, in) as the cache goes by it."""
    known = _known(seen)
    if not known:
        known.append(weight_hash(_as_stored(weight)))
    return known[0]


def _computed(weight: Tensor, decomposition: Decomposition) -> Basis:
    """The basis of a weight (out, in) in its kept form, on the CPU."""
    ((_, basis),) = decompose_all({"": weight}, decomposition, device=weight.device, keep=True)
    return to_keep(basis)


def _adapted(base: Tensor, layer: Layer, bases: Mapping[Decomposition, Basis], strength: float) -> Tensor:
    """An fp32 `base` (out, in) with a layer at a strength, to the last bit as SODA Loader merges it."""
    if layer.decomposition != "svd" or layer.decomposition not in bases:
        return adapt(base, [layer.scaled(strength)], bases)
    assert layer.delta is not None
    basis, turned = bases[layer.decomposition], base.clone()
    spectrum = Spectrum(basis.left, basis.right, torch.where(basis.live, layer.delta, 0.0))
    compressed_change([spectrum], base, torch.int16).add_to(turned, strength)
    return adapt(turned, rotation_only({"": (layer.scaled(strength),)})[""], {})


def _error(layer: Layer, basis: Basis) -> float:
    """How far the spectrum is off from what it did in training; 0 where the file has no sketch of that."""
    if layer.delta is None or layer.sketch is None:
        return 0.0
    host = Layer(layer.decomposition, layer.delta.to(CPU), (), layer.sketch.to(CPU))
    return spectrum_error([(host, basis)]) or 0.0


def _keep(place: tuple[str, torch.Size], key: Key, basis: Basis, to_disk: bool) -> None:
    """Keep the basis of a weight of this name and shape, and the one before: behind LoRAs of changing strength it is
    another weight each time, and would fill the memory with bases that nobody asks for again."""
    CACHE.put(key, basis, to_disk)
    kept = _kept.setdefault((*place, key[1]), [])
    kept[:] = [*(known for known in kept if known != key), key]
    if len(kept) > BASES:
        CACHE.forget(kept.pop(0))


def _as_stored(weight: Tensor) -> Tensor:
    """The narrow weight that core has cast to this one, if so: SODA Loader's bases go by the numbers as stored."""
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16):
        narrow = weight.to(dtype)
        if torch.equal(narrow.to(weight.dtype), weight):
            return narrow
    return weight


def _merging(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a weight that came in `dtype` is met once, to be merged: core casts narrow ones to fp32 for that. One of
    an fp32 model looks the same in every forward."""
    return dtype == torch.float32 and _as_stored(weight) is not weight


def _basis_bytes(layer: Layer) -> int:
    """Bytes of the vectors that a layer's spectrum needs (see `decomposition`); with svd at least so many, for a file
    does not say how many outputs a weight has."""
    if layer.delta is None:
        return 0
    k = layer.delta.numel()
    return KEPT_DTYPE.itemsize * k * (layer.dimension + (k if layer.decomposition == "svd" else 0))
