"""Does an adapter fit a model? Layers are matched by name and shape, and its spectrum is checked against the base.

A spectrum change D is only right on the base it was trained on. The file's 8x8 sketches of D measure, per adapter,
how far D on this base is from D on that one: below 2 % nothing is said, up to 20 % the node says it, and beyond
that only the rotation is applied and the node says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from comfy.model_patcher import ModelPatcher

from ...adapter import Adapter, Decomposition, Layer
from ...decomposition import Basis, spectral_change
from ...errors import SodaMixError
from ...fingerprint import sketch
from .base import split_name

SILENT_ERROR = 0.02
REFUSED_ERROR = 0.20


@dataclass
class Report:
    """What applying adapters did: counts of layers, names that found no place, sentences for the user."""

    changed: int = 0
    unmatched: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def text(self) -> str:
        lines = [f"{self.changed} layer{'' if self.changed == 1 else 's'} changed"]
        if self.unmatched:
            shown = ", ".join(self.unmatched[:3])
            more = f" and {len(self.unmatched) - 3} more" if len(self.unmatched) > 3 else ""
            lines.append(f"{len(self.unmatched)} keys did not match: {shown}{more}")
        return "\n".join(lines + self.warnings)


def misfit(terms: Sequence[Layer], shape: Sequence[int] | None) -> str | None:
    """Why these terms cannot change a weight of this shape, (out, in); None if they can, shape None if it is absent."""
    if shape is None:
        return "the model has no such layer"
    if len(shape) != 2:
        return f"the model's weight has {len(shape)} dimensions {tuple(shape)}, expected 2"
    for term in terms:
        width = shape[0] if term.side == "output" else shape[1]
        if term.dimension != width:
            return f"the adapter turns {term.side}s of width {term.dimension}, the model has {tuple(shape)}"
        if term.delta is not None and term.delta.numel() != min(shape):
            return f"the adapter's spectrum has {term.delta.numel()} numbers, the model's weight {tuple(shape)}"
    return None


def shapes(patcher: ModelPatcher) -> dict[str, tuple[int, ...]]:
    """State dict key -> shape, without moving or copying a weight."""
    return {key: tuple(weight.shape) for key, weight in patcher.model_state_dict().items()}


def matching(adapter: Adapter, known: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, tuple[Layer, ...]], dict]:
    """(the layers that fit a model of these shapes, layer -> reason for those that do not)."""
    fitting, reasons = {}, {}
    for name, terms in adapter.layers.items():
        key, rows = split_name(name)
        shape = known.get(key)
        if shape is not None and rows is not None:
            shape = (rows[1] - rows[0], *shape[1:]) if rows[1] <= shape[0] else None
        reason = misfit(terms, shape)
        if reason is None:
            fitting[name] = terms
        else:
            reasons[name] = reason
    return fitting, reasons


def refuse(adapter: Adapter, reasons: Mapping[str, str], model_name: str) -> SodaMixError:
    """The error for an adapter of which nothing fits."""
    # A wrong width says more than a missing layer.
    shown = sorted(reasons.items(), key=lambda item: item[1] == "the model has no such layer")[:2]
    examples = "; ".join(f"{name}: {reason}" for name, reason in shown)
    return SodaMixError(
        f"The adapter {adapter.name or 'given'!r} does not fit the model {model_name}: none of its "
        f"{len(reasons)} layers match ({examples}). It was made for "
        f"{adapter.metadata.get('modelspec.architecture', 'another architecture')}. "
        "Use it with a model of that architecture."
    )


def spectrum_error(
    layers: Mapping[str, tuple[Layer, ...]], basis: Mapping[tuple[str, Decomposition], Basis],
    known: Mapping[str, tuple[int, ...]],
) -> float | None:  # fmt: skip
    """Estimated ||D here - D trained|| / ||D trained|| over all layers with a sketch; None when there is none."""
    wrong, whole = 0.0, 0.0
    for name, terms in layers.items():
        key, rows = split_name(name)
        shape = known[key] if rows is None else (rows[1] - rows[0], known[key][1])
        for term in terms:
            if term.delta is None or term.sketch is None:
                continue
            here = sketch(spectral_change(basis[name, term.decomposition], term.delta, shape))
            wrong += (here.double() - term.sketch.double()).square().sum().item()
            whole += term.sketch.double().square().sum().item()
    return (wrong / whole) ** 0.5 if whole > 0 else None


def rotation_only(layers: Mapping[str, tuple[Layer, ...]]) -> dict[str, tuple[Layer, ...]]:
    """The same layers with the spectrum left as it is; the form is kept, so that such layers still mix."""

    def still(term: Layer) -> Layer:
        if term.delta is None:
            return term
        return replace(term, delta=torch.zeros_like(term.delta), sketch=None)

    return {name: tuple(still(term) for term in terms) for name, terms in layers.items()}


def check_spectrum(
    adapter: Adapter, layers: Mapping[str, tuple[Layer, ...]], basis: Mapping[tuple[str, Decomposition], Basis],
    known: Mapping[str, tuple[int, ...]], report: Report,
) -> Mapping[str, tuple[Layer, ...]]:  # fmt: skip
    """The layers to apply under the policy above; what the user must know goes to `report.warnings`."""
    error = spectrum_error(layers, basis, known)
    if error is None or error < SILENT_ERROR:
        return layers
    trained_on = adapter.metadata.get("ss_base_model_version") or "another base"
    about = f"{adapter.name or 'The adapter'} was trained on other weights ({trained_on})"
    if error <= REFUSED_ERROR:
        report.warnings.append(f"{about}: its spectrum is off by about {error:.0%} here.")
        return layers
    report.warnings.append(
        f"{about}: its spectrum would be off by about {error:.0%} here, so only its rotation is applied."
    )
    return rotation_only(layers)
