"""The unpatched base weights of a ComfyUI model, and their bases, computed once and kept as the user allows.

ComfyUI swaps patched weights into the model while it is loaded and keeps the originals in `patcher.backup`.
Decompositions are computed from those originals and shared by all adapters and strengths.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

import folder_paths
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.model_patcher import ModelPatcher, get_key_weight
from comfy.quant_ops import QuantizedTensor
from comfy.utils import get_attr

from ...adapter import Decomposition, split_rows
from ...bases import Some
from ...basis_cache import BasisCache
from ...basis_folder import Wanted
from ...content import samples
from ...decomposition import Basis, kept_bytes
from .quantised import dequantised_gguf, is_gguf, stored_parts, with_parts
from .settings import basis_bounds

Place = tuple[str, Decomposition]  # a layer and what is made of its weight
CACHE = BasisCache(folder=Path(folder_paths.get_user_directory()) / "soda" / "bases")


def bounded_cache() -> BasisCache:
    """The cache, within what the user's settings say now."""
    CACHE.bound(*basis_bounds())
    return CACHE


@lru_cache(maxsize=1 << 14)
def split_name(layer: str) -> tuple[str, tuple[int, int] | None]:
    """`path` or `path[a:b]` -> (state dict key, rows a to b of a fused weight or None)."""
    path, rows = split_rows(layer)
    return f"{path}.weight", rows


def unpatched(patcher: ModelPatcher, key: str) -> torch.Tensor:
    """The base weight of `key`, whatever patches or hooks are loaded now; on its own device, in its own dtype.

    A quantised weight is returned dequantised. The result may share memory with the model: read only.
    """
    found, _, convert = get_key_weight(patcher.model, key)
    weight = _unpatched(patcher, key, found)
    if is_gguf(weight):
        return dequantised_gguf(get_attr(patcher.model, key.rsplit(".", 1)[0]), weight)
    return weight if convert is None else convert(weight, inplace=False)


def _stored(patcher: ModelPatcher, key: str) -> torch.Tensor:
    """The base weight of `key` as it lies in memory."""
    return _unpatched(patcher, key, get_key_weight(patcher.model, key)[0])


def _unpatched(patcher: ModelPatcher, key: str, found: torch.Tensor) -> torch.Tensor:
    """The base weight of `key`, where `found` is what the model has."""
    if key in patcher.hook_backup:
        return patcher.hook_backup[key][0]
    return patcher.backup[key].weight if key in patcher.backup else found


def alias(held: torch.Tensor) -> torch.Tensor:
    """The same memory as a normal tensor: one made under inference mode cannot be saved for backward."""
    if isinstance(held, QuantizedTensor):
        return torch.nn.Parameter(with_parts(held, alias), requires_grad=False)
    with torch.inference_mode(False):
        tensor = torch.empty(0, dtype=held.dtype, device=held.device)
        tensor.set_(held.untyped_storage(), held.storage_offset(), held.shape, held.stride())
        return torch.nn.Parameter(tensor, requires_grad=False) if isinstance(held, torch.nn.Parameter) else tensor


def matrix_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """(out, in) of a 1 x 1 convolution's weight (out, in, 1, ...); any other shape as it is."""
    return tuple(shape[:2]) if all(size == 1 for size in shape[2:]) else tuple(shape)


@torch.inference_mode()  # threads start outside it, where a view of a weight that was loaded in it may be refused
def layer_weight(patcher: ModelPatcher, layer: str) -> torch.Tensor:
    """The unpatched weight of one adapter layer, (out, in); rows a to b if the name says so. It takes no gradient."""
    key, rows = split_name(layer)
    weight = unpatched(patcher, key).detach()
    weight = weight.reshape(matrix_shape(weight.shape))
    return weight if rows is None else weight[rows[0] : rows[1]]


def shapes(patcher: ModelPatcher) -> dict[str, tuple[int, ...]]:
    """Key of a parameter -> shape, a 1 x 1 convolution's as a matrix; without moving or copying a weight.

    Not from the state dict, which holds quantised weights as they are packed.
    """
    return {key: matrix_shape(weight.shape) for key, weight in patcher.model.named_parameters()}


def layer_shape(patcher: ModelPatcher, layer: str) -> tuple[int, ...]:
    """(out, in) of one adapter layer, without touching its weight."""
    key, rows = split_name(layer)
    return part_shape(matrix_shape(get_key_weight(patcher.model, key)[0].shape), rows)


def part_shape(shape: tuple[int, ...], rows: tuple[int, int] | None) -> tuple[int, ...]:
    """That of rows a to b of a matrix, None for all."""
    return shape if rows is None else (rows[1] - rows[0], *shape[1:])


class UnpatchedWeights(Mapping[str, torch.Tensor]):
    """Layer -> unpatched weight (out, in) of some layers of networks, looked up anew each time: a quantised one takes
    memory only for a while."""

    def __init__(self, networks: Mapping[ModelPatcher, Iterable[str]]):
        self.layers = {layer: patcher for patcher, layers in networks.items() for layer in layers}

    def __getitem__(self, layer: str) -> torch.Tensor:
        return layer_weight(self.layers[layer], layer)

    def __contains__(self, layer: object) -> bool:
        return layer in self.layers

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def stored(self) -> dict[str, torch.Tensor]:
        """Layer -> its weight, all rows, as it lies in memory."""
        keys = {layer: (patcher, split_name(layer)[0]) for layer, patcher in self.layers.items()}
        found = {place: _stored(*place) for place in dict.fromkeys(keys.values())}
        return {layer: found[place] for layer, place in keys.items()}


def _samples(stored: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Layer -> a digest that tells a changed weight from the same one; unpacks none."""
    parts = {id(weight): stored_parts(weight) for weight in stored.values()}
    digests = iter(samples([part for some in parts.values() for part in some]))
    found = {one: " ".join(islice(digests, len(some))) for one, some in parts.items()}
    return {layer: found[id(weight)] for layer, weight in stored.items()}


class TrainableWeights(UnpatchedWeights):
    """These on the device their network computes on, as tensors that may take part in training, fp32 unless of half
    precision; not copied where they already are so."""

    def __getitem__(self, layer: str) -> torch.Tensor:
        throw_exception_if_processing_interrupted()  # each is decomposed, which takes minutes for all of a large model
        weight = super().__getitem__(layer).to(self.layers[layer].load_device)
        weight = weight if weight.dtype in (torch.bfloat16, torch.float16) else weight.float()
        return alias(weight) if weight.is_inference() else weight

    def bases(self, weights: Iterable[str], decomposition: Decomposition) -> Iterator[tuple[str, Basis]]:
        """(layer, basis as kept) of some of these; whoever applies what was trained needs them too."""
        networks: dict[ModelPatcher, set[tuple[str, Decomposition]]] = {}
        for layer in weights:
            networks.setdefault(self.layers[layer], set()).add((layer, decomposition))
        for patcher, places in networks.items():
            for (layer, _), basis in ModelBases(patcher, places, shapes(patcher)).each(places):
                yield layer, basis


class ModelBases:
    """The bases that some layers of a model need: those of the unpatched weights, as kept, on the CPU.

    shapes: those of the model's parameters, as matrices. dtypes: of the weights as they are stored.
    """

    def __init__(
        self, patcher: ModelPatcher, wanted: Iterable[tuple[str, Decomposition]], shapes: Mapping[str, tuple[int, ...]]
    ):
        self._cache = bounded_cache()
        self._device = patcher.load_device
        self._found: dict[Place, Basis] = {}
        wanted = set(wanted)
        self.weights = UnpatchedWeights({patcher: [layer for layer, _ in sorted(wanted)]})
        named = {layer: split_name(layer) for layer in self.weights}
        self._shapes = {layer: part_shape(shapes[key], rows) for layer, (key, rows) in named.items()}
        self.bytes = sum(kept_bytes(self._shapes[layer], kind) for layer, kind in wanted)
        stored = self.weights.stored()
        self.dtypes = {layer: weight.dtype for layer, weight in stored.items()}
        self.hashes = self._cache.hashes(self.weights, patcher.model, _samples(stored))

    @property
    def kept(self) -> bool:
        """Whether the user's settings leave memory for all of them."""
        return self.bytes <= self._cache.memory

    def warnings(self) -> list[str]:
        """What the user should know of that."""
        if self.kept or not self._cache.memory:
            return []
        size, memory = (f"{number / 2**30:.1f} GB" for number in (self.bytes, self._cache.memory))
        return [
            f"The bases for this model take {size}, more than the {memory} that Settings > SODA leaves them: they are "
            "made anew whenever the model is loaded."
        ]

    def wanted(self, place: Place) -> Wanted:
        """What the cache knows the basis by."""
        layer, decomposition = place
        return (self.hashes[layer], decomposition), self._shapes[layer]

    def found(self, places: Collection[Place]) -> dict[Place, Basis]:
        """Some of them; only their outlines where they are not kept."""
        missing = [place for place in places if place not in self._found]
        for place, basis in self.each(missing):
            self._found[place] = basis if self.kept else basis.outline()
        return {place: self._found[place] for place in places}

    def each(self, places: Collection[Place]) -> Iterator[tuple[Place, Basis]]:
        """((layer, decomposition), basis) of some of them, from the cache or computed now."""
        for decomposition in sorted({kind for _, kind in places}):
            weights = Some(self.weights, (layer for layer, kind in sorted(places) if kind == decomposition))
            found = self._cache.bases(
                weights,
                decomposition,
                hashes=self.hashes,
                shapes=self._shapes,
                device=self._device,
                progress=_stop_if_cancelled,
            )
            for layer, basis in found:
                yield (layer, decomposition), basis


def _stop_if_cancelled(done: int, total: int) -> None:
    throw_exception_if_processing_interrupted()
