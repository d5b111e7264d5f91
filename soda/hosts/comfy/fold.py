"""What the SODA patches of one model share: the mix that they apply, made ready for a strength and a device at once.

A patch is asked for one weight at a time, under low VRAM in every forward. So what is small (the rotations' factors and
the spectra) is made for all layers together when the first weight is met, and lies on the device while it is in use:
ComfyUI's cache may hold the models of a hundred strengths that somebody tried. What is large, the vectors of the bases,
travels with each patch; or, where the user's settings leave no memory for it, is made from the weight at hand.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...adapt import Spectrum
from ...adapter import Adapter, Decomposition, Layer
from ...bases import decompose_all
from ...decomposition import Basis, Key
from ...rotation import Rotations, rotations
from .base import CACHE, ModelBases
from .pinned import on_device

STRENGTHS = 4  # kept at a time; schedules change it as they go
FOLDS = 4  # ready at a time: of the model, of a second one, of their text encoders
Place = tuple[str, Decomposition]
Vectors = tuple[Tensor | None, Tensor | None]  # left, right


class Ready(NamedTuple):
    """One layer at a strength, on a device: delta `(k,)` by term, None where it changes nothing; the rotations."""

    deltas: tuple[Tensor | None, ...]
    turns: Rotations


@dataclass(eq=False)
class Fold:
    """The mix of all SODA adapters on one model."""

    mix: Adapter

    def __post_init__(self) -> None:
        self.keys: dict[Place, Key] = {}
        self._ready: dict[tuple[float, torch.device], dict[str, Ready]] = {}
        self._met: set[str] = set()
        self._made: dict[Place, Basis] = {}

    @classmethod
    def of(cls, mix: Adapter, bases: ModelBases) -> tuple[Fold, dict[Place, Basis]]:
        """The fold, and the bases for its patches to carry; none where these are not to be kept."""
        needed = {
            (name, term.decomposition) for name, terms in mix.layers.items() for term in terms if _has_spectrum(term)
        }
        found = dict(bases.each(needed)) if bases.kept else {}
        fold = cls(replace(mix, layers={name: _live(name, terms, found) for name, terms in mix.layers.items()}))
        fold.keys = {place: bases.key(*place) for place in needed}
        return fold, found

    def ready(self, name: str, strength: float, device: torch.device) -> Ready:
        """One layer's, made for all layers at the first look."""
        place = (strength, device)
        if place not in self._ready:
            while len(self._ready) >= STRENGTHS:
                self._ready.pop(next(iter(self._ready)))
            self._ready[place] = _prepare(self.mix.layers, strength, device)
        self._use()
        return self._ready[place][name]

    def _use(self) -> None:
        """Be the last one used, and let go of what is ready in the one that was not used for longest."""
        if _used and _used[-1]() is self:
            return
        others = [fold for fold in (known() for known in _used) if fold is not None and fold is not self]
        for fold in others[: -FOLDS + 1]:
            fold._ready.clear()
        _used[:] = [weakref.ref(fold) for fold in (*others[-FOLDS + 1 :], self)]

    def spectra(
        self, name: str, vectors: Sequence[Vectors], deltas: Sequence[Tensor | None], weight: Tensor
    ) -> list[Spectrum]:
        """The spectra of one layer; without vectors, by bases of `weight` (out, in) itself."""
        again = name in self._met  # who asks twice asks in every forward
        self._met.add(name)
        found = []
        for term, sides, delta in zip(self.mix.layers[name], vectors, deltas, strict=True):
            if delta is None:
                continue
            if sides == (None, None):
                basis = self._basis((name, term.decomposition), weight, again)
                sides, delta = (basis.left, basis.right), torch.where(basis.live.to(delta.device), delta, 0.0)
            left, right = (None if side is None else on_device(side, weight.device, again) for side in sides)
            found.append(Spectrum(term.decomposition, left, right, delta))
        return found

    def _basis(self, place: Place, weight: Tensor, again: bool) -> Basis:
        """From the disk, or computed; for who asks again it is kept all the same."""
        if place in self._made:
            return self._made[place]
        basis = CACHE.get(self.keys[place], weight.shape)
        if basis is None:
            ((_, computed),) = decompose_all({"": weight}, place[1], device=weight.device)
            basis = computed.kept()
        if again:
            self._made[place] = basis
        return basis


_used: list[weakref.ref[Fold]] = []  # the one used last at the end


def _has_spectrum(term: Layer) -> bool:
    return term.delta is not None and bool(term.delta.count_nonzero())


def _live(name: str, terms: tuple[Layer, ...], bases: Mapping[Place, Basis]) -> tuple[Layer, ...]:
    """The terms with delta 0 where the basis at hand is not live."""
    result = []
    for term in terms:
        basis = bases.get((name, term.decomposition))
        if basis is not None and term.delta is not None:
            term = replace(term, delta=torch.where(basis.live, term.delta, 0.0))
        result.append(term)
    return tuple(result)


@torch.inference_mode(False)
@torch.no_grad()
def _prepare(layers: Mapping[str, tuple[Layer, ...]], strength: float, device: torch.device) -> dict[str, Ready]:
    changing = [term for terms in layers.values() for term in terms if _has_spectrum(term)]
    deltas = [term.delta for term in changing if term.delta is not None]
    together = torch.cat([torch.zeros(0), *deltas]).to(device) * strength
    parts = dict(zip(map(id, changing), together.split([len(delta) for delta in deltas]), strict=True))
    turns = rotations(layers, strength, device)
    return {name: Ready(tuple(parts.get(id(term)) for term in terms), turns[name]) for name, terms in layers.items()}
