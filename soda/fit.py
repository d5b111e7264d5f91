"""Does an adapter fit a base? Layers by shape, spectra by what their sketches say.

A spectrum change D is only right on the base it was trained on. The file's 8 x 8 sketches of D measure how far D on
this base is from D on that one: below 2 % nothing needs to be said, up to 20 % the user must know, and beyond that
only the rotation is fit to be applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .adapter import Layer
from .decomposition import Basis, spectral_sketch
from .fingerprint import relative_error

SILENT_ERROR = 0.02
REFUSED_ERROR = 0.20


def misfit(terms: Sequence[Layer], shape: Sequence[int]) -> str | None:
    """Why these terms cannot change a weight of this shape, (out, in); None if they can."""
    if len(shape) != 2:
        return f"the model's weight has {len(shape)} dimensions {tuple(shape)}, expected 2"
    for term in terms:
        width = shape[0] if term.side == "output" else shape[1]
        if term.dimension != width:
            return f"the adapter turns {term.side}s of width {term.dimension}, the model's weight is {tuple(shape)}"
        if term.delta is not None and term.delta.numel() != min(shape):
            return f"the adapter's spectrum has {term.delta.numel()} numbers, the model's weight is {tuple(shape)}"
    return None


def spectrum_error(terms: Iterable[tuple[Layer, Basis]]) -> float | None:
    """Estimated ||D here - D trained|| / ||D trained|| over terms with a sketch, each given with the basis of the
    weight at hand; None when no term has a sketch. Good to some +-40 %, better for many. All on the CPU."""
    return relative_error(_sketches(terms))


def _sketches(terms: Iterable[tuple[Layer, Basis]]) -> Iterator[tuple[Tensor, Tensor]]:
    """(those of D with the bases at hand, those of D with the ones trained on), `(B, 8, 8)`, of terms with as many
    numbers together: one at a time they would take longer than to read them."""
    alike: dict[int, list[tuple[Layer, Basis]]] = {}
    for term, basis in terms:
        if term.delta is not None and term.sketch is not None:
            alike.setdefault(len(term.delta), []).append((term, basis))
    for members in alike.values():
        deltas = torch.stack([term.delta for term, _ in members if term.delta is not None])
        trained = torch.stack([term.sketch for term, _ in members if term.sketch is not None])
        outlines = [basis.outline().tensors() for _, basis in members]
        together = {name: torch.stack([outline[name] for outline in outlines]) for name in outlines[0]}
        yield spectral_sketch(Basis.of(members[0][1].decomposition, together), deltas), trained


def rotation_only(layers: Mapping[str, tuple[Layer, ...]]) -> dict[str, tuple[Layer, ...]]:
    """The same layers with the spectrum left as it is; the form is kept, so that such layers still mix."""

    def still(term: Layer) -> Layer:
        if term.delta is None:
            return term
        return replace(term, delta=torch.zeros_like(term.delta), sketch=None)

    return {name: tuple(still(term) for term in terms) for name, terms in layers.items()}
