"""What an adapter does, in numbers per layer that need no base.

rotation   R = exp(A), A = sum of A_j over the factors: its angles theta have
           rms^2 = ||A||^2 / N = sum_j ||A_j||^2 / n_j,   largest = sum_j max theta_j   (until it passes pi)
spectrum   ||D|| = ||delta||, since lq, svd and qr change W0 along orthonormal directions;
           rms = ||delta|| / sqrt k, in the units of the weights
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .adapter import Adapter, Layer
from .kronecker import skew
from .metadata import PICTURES


@dataclass(frozen=True)
class LayerSummary:
    """One layer: angles in degrees, the spectrum's change in units of the weights (None for `none`)."""

    name: str
    decomposition: str
    sizes: tuple[int, ...]
    angle_rms: float
    angle_largest: float
    spectrum_rms: float | None


def summarise(adapter: Adapter) -> list[LayerSummary]:
    """One entry per layer and term, in the order of a diffusion model: input, middle, output blocks."""
    terms = [(name, term) for name in sorted(adapter.layers, key=_place) for term in adapter.layers[name]]
    largest = _largest_angles([term for _, term in terms])
    return [
        LayerSummary(
            name=name,
            decomposition=term.decomposition,
            sizes=term.sizes,
            angle_rms=math.degrees(_angle_rms(term)),
            angle_largest=math.degrees(angle),
            spectrum_rms=None if term.delta is None else float(term.delta.double().square().mean().sqrt()),
        )
        for (name, term), angle in zip(terms, largest, strict=True)
    ]


def as_json(adapter: Adapter) -> dict[str, object]:
    """Everything that `inspect --json` says, without the thumbnail."""
    layers = summarise(adapter)
    return {
        "name": adapter.name,
        "layers": len(adapter.layers),
        "numbers": sum(t.numel() for terms in adapter.layers.values() for term in terms for t in _stored(term)),
        "decompositions": sorted({layer.decomposition for layer in layers}),
        "content_hash": adapter.content_hash,
        "metadata": {key: value for key, value in sorted(adapter.metadata.items()) if key not in PICTURES},
        "by_layer": [asdict(layer) for layer in layers],
    }


def _stored(term: Layer) -> Sequence[Tensor]:
    return [t for t in (term.delta, *term.logs, term.sketch) if t is not None]


def _angle_rms(term: Layer) -> float:
    """||A_j||^2 is twice the sum of squares of its triangle."""
    pairs = zip(term.logs, term.sizes, strict=True)
    return math.sqrt(sum(2 * float(log.double().square().sum()) / n for log, n in pairs))


def _largest_angles(terms: Sequence[Layer]) -> list[float]:
    """The sum over factors of the largest eigenvalue of the Hermitian iA_j, batched over factors of one size."""
    places: dict[int, list[tuple[int, Tensor]]] = {}
    for i, term in enumerate(terms):
        for n, log in zip(term.sizes, term.logs, strict=True):
            places.setdefault(n, []).append((i, log))
    angles = [0.0] * len(terms)
    for n, entries in places.items():
        if n == 1:
            continue
        a = skew(torch.stack([log.double() for _, log in entries]), n)
        for (i, _), angle in zip(entries, torch.linalg.eigvalsh(1j * a)[:, -1].tolist(), strict=True):
            angles[i] += angle
    return angles


def _place(name: str) -> list[tuple[int, int, str]]:
    """Sorts numbers as numbers; input (down), middle and output (up) blocks come in the model's order by themselves."""
    pieces = re.split("([0-9]{1,9})", name)
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces]
