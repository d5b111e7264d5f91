"""What the SODA patches of one model share: the mix that they apply, made ready for a strength and a device at once.
Models with the same mix on the same weights share one, so that another strength finds all that does not hang on it.

A patch is asked for one weight at a time: once, where ComfyUI merges it into the weight, or in every forward, where it
has no room for that. What is small (the rotations' factors and the spectra) is made for all layers together when the
first weight is met, and lies on the device while it is in use: ComfyUI's cache may hold the models of a hundred
strengths that somebody tried. What is large, the vectors of the bases, lies in main memory; or is made from the weight
at hand and dropped, where the user's settings leave no memory for it; of fp32 weights it is kept from the second time
on even so, since ComfyUI merges these as it patches them in every forward.

A layer that is asked for in every forward gets its change of the spectrum in 8 bits (`compressed`): from the first time
on, so that all forwards are alike, and kept from the second on, whatever the strengths: who tries strengths may ask
once at each. It is a quarter to a half of the bytes that the vectors would send over the bus each time. Where these are
more than the weight's numbers (svd), a merge gets it too, in 16 bits. Where both take more than `MOST`, the vectors are
left to the disk as soon as it has them; another mix reads them from there.

A GPU is bound by launches here. So the changes of neighbours of one shape are made together, ahead of their time, when
they are met for the first time, which a mix of other weights does at every run. And an fp16 weight is adapted in fp16
on a GPU in every forward, as ComfyUI's own patches do: W0 + D and its rotation by one half of R are rounded as well as
the result. bf16 would lose eight times as much and goes through fp32.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...adapt import Spectrum, changed, compressed_change, compressed_changes
from ...adapter import Adapter, Layer
from ...bases import decompose_all, to_keep
from ...basis_folder import Wanted
from ...compressed import Compressed
from ...decomposition import Basis
from ...precision import CPU
from ...rotation import Logarithms, Rotations
from .base import CACHE, ModelBases, Place
from .pinned import on_device, to_main_memory, vectors_on_device

STRENGTHS = 4  # kept at a time; schedules change it as they go
FOLDS = 4  # ready at a time: of the model, of a second one, of their text encoders
AT_ONCE = 3 << 22  # numbers of the changes made together; each takes up to 24 bytes for a moment
MOST = 4  # bytes in main memory for each number of an adapted weight


class Ready(NamedTuple):
    """One layer at a strength, on a device: delta `(k,)` by term, None where it changes nothing; the rotations."""

    deltas: tuple[Tensor | None, ...]
    turns: Rotations


class Common(NamedTuple):
    """What is common to all strengths, on a device: deltas by layer and term, parts of one tensor, and logarithms."""

    deltas: Tensor
    apart: dict[tuple[str, int], Tensor]
    logs: Logarithms

    @classmethod
    def of(cls, layers: Mapping[str, tuple[Layer, ...]], wanted: Container[Place], device: torch.device) -> Common:
        """`wanted`: the bases that some delta needs."""
        changing = {
            (name, index): term.delta
            for name, terms in layers.items()
            for index, term in enumerate(terms)
            if term.delta is not None and (name, term.decomposition) in wanted
        }
        deltas = torch.cat([torch.zeros(0), *changing.values()]).to(device)
        parts = deltas.split([len(delta) for delta in changing.values()])
        return cls(deltas, dict(zip(changing, parts, strict=True)), Logarithms.of(layers, device))

    def at(self, strength: float) -> dict[tuple[str, int], Tensor]:
        """The deltas."""
        parts = (self.deltas * strength).split([len(delta) for delta in self.apart.values()])
        return dict(zip(self.apart, parts, strict=True))


@dataclass(eq=False)
class Fold:
    """The mix of all SODA adapters on one model, and the bases that are kept for it."""

    mix: Adapter
    bases: dict[Place, Basis]
    wanted: Mapping[Place, Wanted]  # all bases needed
    unsure: frozenset[str] = frozenset()  # layers of which nothing tells a merge from a forward
    wide: frozenset[str] = frozenset()  # those whose vectors are more than the weight's numbers
    _ready: dict[tuple[float, torch.device, torch.dtype], dict[str, Ready]] = field(default_factory=dict, init=False)
    _common: dict[torch.device, Common] = field(default_factory=dict, init=False)
    _met: set[str] = field(default_factory=set, init=False)  # layers that were asked for, at whatever strength
    _changes: dict[tuple[str, torch.dtype], Compressed] = field(default_factory=dict, init=False)
    _ahead: dict[tuple[str, torch.dtype, torch.device], Compressed] = field(default_factory=dict, init=False)
    _alike: dict[str, list[str]] | None = field(default=None, init=False)  # see `_together`
    _masked: frozenset[Place] = field(init=False)  # of whose bases the deltas are 0 already where they are not live

    def __post_init__(self) -> None:
        self._masked = frozenset(self.bases)

    @classmethod
    def of(cls, mix: Adapter, bases: ModelBases, source: Hashable) -> Fold:
        """That of a mix on the weights of these bases; `source` tells it from other mixes."""
        if not bases.kept:  # nothing is to outlast the model that is loaded
            return cls._new(mix, bases)
        key = source, frozenset(bases.hashes.items())
        fold = _shared.get(key)
        if fold is None:
            fold = _shared[key] = cls._new(mix, bases)
        return fold

    @classmethod
    def _new(cls, mix: Adapter, bases: ModelBases) -> Fold:
        needed = {
            (name, term.decomposition) for name, terms in mix.layers.items() for term in terms if _has_spectrum(term)
        }
        found = bases.found(needed) if bases.kept else {}
        live = {name: _live(name, terms, found) for name, terms in mix.layers.items()}
        unsure = frozenset(name for name, _ in needed if bases.dtypes[name] == torch.float32)
        kinds = Counter(name for name, kind in needed for _ in range(2 if kind == "svd" else 1))
        wide = frozenset(name for name, sides in kinds.items() if sides > 1)
        return cls(replace(mix, layers=live), found, {place: bases.wanted(place) for place in needed}, unsure, wide)

    def adapted(self, name: str, weight: Tensor, strength: float, repeated: bool) -> Tensor:
        """The `weight` (out, in) of one layer adapted, in fp32 or its own dtype, perhaps in its memory; `repeated`: it
        is asked for in every forward."""
        half = repeated and weight.dtype == torch.float16 and weight.is_cuda
        ready = self._ready_for(strength, weight.device, torch.float16 if half else torch.float32)
        deltas, turns = ready[name]
        again = name in self._met
        self._met.add(name)
        if not repeated and name not in self.wide:
            keep = again and name in self.unsure
            return changed(weight, self._spectra(name, deltas, weight, keep), turns, inplace=True)
        total = weight.contiguous() if half else weight.to(torch.float32, memory_format=torch.contiguous_format)
        if any(delta is not None for delta in deltas):
            self._change(name, weight, repeated, again).add_to(total, strength)
        return turns.turned(total)

    def _change(self, name: str, weight: Tensor, repeated: bool, again: bool) -> Compressed:
        """D of one layer at strength 1, on the weight's device; kept if it is asked for `again`."""
        dtype = torch.int8 if repeated else torch.int16
        kept = self._changes.get((name, dtype))
        if kept is not None:
            return kept._replace(data=on_device(kept.data, weight.device))
        keep = again and (repeated or name in self.unsure or bool(self._bases_of(name)))
        change = self._ahead.pop((name, dtype, weight.device), None)
        if change is None:
            change = self._made(name, weight, dtype, keep)
        if keep:
            self._changes[name, dtype] = change._replace(data=to_main_memory(change.data))
            held = sum(basis.nbytes for _, basis in self._bases_of(name))
            if change.data.nbytes + held > MOST * weight.numel():
                for place, _ in self._bases_of(name):
                    CACHE.leave_to_disk(*self.wanted[place], partial(self._without_vectors, place))
        return change

    def _made(self, name: str, weight: Tensor, dtype: torch.dtype, keep: bool) -> Compressed:
        """The change of one layer, and ahead of their time those of others."""

        def spectra(name: str) -> list[Spectrum]:
            deltas = [apart.get((name, index)) for index in range(len(self.mix.layers[name]))]
            # Other mixes will need the vectors, this one only if its change is not kept.
            return self._spectra(name, deltas, weight, keep=False, again=not keep)

        apart = self._common_on(weight.device).apart
        together = [name] if keep or weight.device == CPU else self._together(name, AT_ONCE // weight.numel(), apart)
        if len(together) == 1:
            return compressed_change(spectra(name), weight, dtype)
        changes = compressed_changes([one for other in together for one in spectra(other)], dtype)
        self._ahead.update({(other, dtype, weight.device): c for other, c in zip(together, changes, strict=True)})
        return self._ahead.pop((name, dtype, weight.device))

    def _together(self, name: str, count: int, apart: Iterable[tuple[str, int]]) -> list[str]:
        """A layer with those beside it, `count` at most, whose changes are of its form and were not made yet: ComfyUI
        asks for layers in the order of their names or its reverse, block by block at least. `apart`: terms with a D."""
        if self._alike is None:
            terms, forms = Counter(layer for layer, _ in apart), defaultdict(list)
            for layer, index in apart:
                kind = self.mix.layers[layer][index].decomposition
                if terms[layer] == 1 and kind != "qr":
                    forms[kind, self.wanted[layer, kind][1]].append(layer)
            self._alike = {layer: names for names in forms.values() for layer in names}
        names = self._alike.get(name, [])
        if name not in names:
            return [name]
        start = max(0, min(names.index(name), len(names) - count))
        some = names[start : start + max(count, 1)]
        del names[start : start + len(some)]
        return [other for other in some if other == name or self._has_vectors(other)]

    def _has_vectors(self, name: str) -> bool:
        bases = self._bases_of(name)
        return bool(bases) and all(basis.whole for _, basis in bases)

    def _bases_of(self, name: str) -> list[tuple[Place, Basis]]:
        """Those of one layer that are at hand, perhaps as outlines."""
        places = [(name, term.decomposition) for term in self.mix.layers.get(name, ())]
        return [(place, self.bases[place]) for place in dict.fromkeys(places) if place in self.bases]

    def _without_vectors(self, place: Place) -> None:
        self.bases[place] = self.bases[place].outline()

    def _ready_for(self, strength: float, device: torch.device, dtype: torch.dtype) -> dict[str, Ready]:
        """Made at the first look."""
        place = (strength, device, dtype)
        if place not in self._ready:
            while len(self._ready) >= STRENGTHS:
                self._ready.pop(next(iter(self._ready)))
            self._ready[place] = self._prepared(strength, device, dtype)
        self._use()
        return self._ready[place]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _prepared(self, strength: float, device: torch.device, dtype: torch.dtype) -> dict[str, Ready]:
        common = self._common_on(device)
        deltas, turns = common.at(strength), common.logs.rotations(strength, dtype)
        return {
            name: Ready(tuple(deltas.get((name, index)) for index in range(len(terms))), turns[name])
            for name, terms in self.mix.layers.items()
        }

    def _common_on(self, device: torch.device) -> Common:
        if device not in self._common:
            self._common[device] = Common.of(self.mix.layers, self.wanted, device)
        return self._common[device]

    def _use(self) -> None:
        """Be the last one used, and let go of what is ready in the one that was not used for longest, and of vectors
        that were left to the disk and read from there for another mix since."""
        if _used and _used[-1]() is self:
            return
        for place, basis in self.bases.items():
            if not basis.whole:
                CACHE.leave_to_disk(*self.wanted[place], partial(self._without_vectors, place))
        others = [fold for fold in (known() for known in _used) if fold is not None and fold is not self]
        for fold in others[: -FOLDS + 1]:
            fold._ready.clear()
            fold._common.clear()
            fold._ahead.clear()
        _used[:] = [weakref.ref(fold) for fold in (*others[-FOLDS + 1 :], self)]

    def _spectra(
        self, name: str, deltas: Sequence[Tensor | None], weight: Tensor, keep: bool, again: bool = True
    ) -> list[Spectrum]:
        """The spectra of one layer; without a basis at hand by that of `weight` (out, in) itself, perhaps to `keep`.
        `again`: see `vectors_on_device`."""
        found = []
        for term, delta in zip(self.mix.layers[name], deltas, strict=True):
            if delta is None:
                continue
            place = (name, term.decomposition)
            basis, masked = self.bases.get(place), place in self._masked
            if basis is None or not basis.whole:
                masked, outlined = False, basis is not None
                basis = self._remade(place, weight, outlined)
                if keep or outlined:
                    self.bases[place] = basis
            if not masked and not basis.all_live:
                delta = torch.where(basis.live.to(delta.device), delta, 0.0)
            found.append(Spectrum(*vectors_on_device(basis, weight.device, again), delta))
        return found

    def _remade(self, place: Place, weight: Tensor, outlined: bool) -> Basis:
        """From memory, from the disk, or computed; an `outlined` one was on disk and, if it has to be computed, is not
        any more."""
        key, shape = self.wanted[place]
        basis = CACHE.get(key, shape)
        if basis is None:
            ((_, computed),) = decompose_all({"": weight}, place[1], device=weight.device, keep=True)
            basis = to_keep(computed)
            if outlined:
                CACHE.put(key, basis)
        return basis


_shared: weakref.WeakValueDictionary[Hashable, Fold] = weakref.WeakValueDictionary()
_used: list[weakref.ref[Fold]] = []  # the one used last at the end


def _has_spectrum(term: Layer) -> bool:
    return term.delta is not None and bool(term.delta.count_nonzero())


def _live(name: str, terms: tuple[Layer, ...], bases: Mapping[Place, Basis]) -> tuple[Layer, ...]:
    """The terms with delta 0 where the basis at hand is not live."""
    result = []
    for term in terms:
        basis = bases.get((name, term.decomposition))
        if basis is not None and term.delta is not None and not basis.all_live:
            term = replace(term, delta=torch.where(basis.live, term.delta, 0.0))
        result.append(term)
    return tuple(result)
