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


def shapes(patcher: ModelPatcher) -> dict[str, tuple[int, ...]]:
    """State dict key -> shape, without moving or copying a weight."""
    return {key: tuple(weight.shape) for key, weight in patcher.model_state_dict().items()}


@dataclass
class Matching:
    """Layers of an adapter sorted by what a model of certain shapes has for them."""

    fitting: dict[str, tuple[Layer, ...]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)  # the weight is there, and why its shape does not fit
    absent: list[str] = field(default_factory=list)


def matching(adapter: Adapter, known: Mapping[str, tuple[int, ...]]) -> Matching:
    """Sort the adapter's layers against a model's weights, given by key and shape."""
    result = Matching()
    for name, terms in adapter.layers.items():
        key, rows = split_name(name)
        shape = known.get(key)
        if shape is None or (rows is not None and rows[1] > shape[0]):
            result.absent.append(name)
            continue
        reason = misfit(terms, shape if rows is None else (rows[1] - rows[0], *shape[1:]))
        if reason is None:
            result.fitting[name] = terms
        else:
            result.wrong[name] = reason
    return result


def unmatched(adapter: Adapter, matches: Sequence[Matching], model_name: str) -> list[str]:
    """The adapter's layers that none of the models has. A wrong shape, or no match at all, is an error.

    A layer of that name with another shape means another architecture; applying the rest would only do harm.
    """
    wrong = {name: reason for match in matches for name, reason in match.wrong.items()}
    absent = [name for name in matches[0].absent if all(name in match.absent for match in matches)]
    if not wrong and len(absent) < len(adapter.layers):
        return absent
    if wrong:
        name, reason = next(iter(wrong.items()))
        what = f"{len(wrong)} of its {len(adapter.layers)} layers have another shape (first {name}: {reason})"
    else:
        what = f"the model has none of its {len(absent)} layers (first {', '.join(absent[:2])})"
    made_for = adapter.metadata.get("modelspec.architecture", "another architecture")
    raise SodaMixError(
        f"The adapter {adapter.name or 'given'!r} does not fit the model {model_name}: {what}. "
        f"It was made for {made_for}: use it with a model of that architecture."
    )


def spectrum_error(
    layers: Mapping[str, tuple[Layer, ...]], basis: Mapping[tuple[str, Decomposition], Basis],
    weights: Mapping[str, torch.Tensor],
) -> float | None:  # fmt: skip
    """Estimated ||D here - D trained|| / ||D trained|| over all layers with a sketch; None when there is none."""
    wrong, whole = 0.0, 0.0
    for name, terms in layers.items():
        for term in terms:
            if term.delta is None or term.sketch is None:
                continue
            here = sketch(spectral_change(basis[name, term.decomposition], term.delta, weights[name].cpu().float()))
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
    weights: Mapping[str, torch.Tensor], report: Report,
) -> Mapping[str, tuple[Layer, ...]]:  # fmt: skip
    """The layers to apply under the policy above; what the user must know goes to `report.warnings`."""
    error = spectrum_error(layers, basis, weights)
    if error is None or error < SILENT_ERROR:
        return layers
    trained_on = adapter.metadata.get("soda.base_model") or "another base"
    about = f"{adapter.name or 'The adapter'} was trained on other weights ({trained_on})"
    if error <= REFUSED_ERROR:
        report.warnings.append(f"{about}: its spectrum is off by about {error:.0%} here.")
        return layers
    report.warnings.append(
        f"{about}: its spectrum would be off by about {error:.0%} here, so only its rotation is applied."
    )
    return rotation_only(layers)
