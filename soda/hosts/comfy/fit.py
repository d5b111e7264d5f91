"""Does an adapter fit a ComfyUI model, and what does the node say if not quite?

Layers are matched by name and shape. Where the sketches call the spectrum wrong on this base, the node says it, or
applies only the rotation and says so (`soda.fit` has the estimate and its thresholds).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from comfy.model_patcher import ModelPatcher

from ...adapter import Adapter, Decomposition, Layer
from ...decomposition import Basis
from ...errors import SodaMixError
from ...fit import REFUSED_ERROR, SILENT_ERROR, misfit, rotation_only, spectrum_error
from .base import matrix_shape, split_name


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


def shapes(patcher: ModelPatcher) -> dict[str, tuple[int, ...]]:
    """State dict key -> shape, a 1 x 1 convolution's as a matrix; without moving or copying a weight."""
    return {key: matrix_shape(weight.shape) for key, weight in patcher.model_state_dict().items()}


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


def check_spectrum(
    adapter: Adapter, layers: Mapping[str, tuple[Layer, ...]], basis: Mapping[tuple[str, Decomposition], Basis],
    weights: Mapping[str, torch.Tensor], report: Report,
) -> Mapping[str, tuple[Layer, ...]]:  # fmt: skip
    """The layers to apply here; what the user must know goes to `report.warnings`."""
    error = spectrum_error(
        (term, basis[name, term.decomposition], weights[name].cpu().float())
        for name, terms in layers.items()
        for term in terms
        if term.delta is not None and term.sketch is not None
    )
    if error is None or error < SILENT_ERROR:
        return layers
    trained_on = adapter.metadata.get("soda.base_model") or "another base"
    about = f"{adapter.name or 'The adapter'} was trained on other weights ({trained_on})"
    if error <= REFUSED_ERROR:
        report.warnings.append(f"{about}: its spectrum is off by about {error:.0%} here.")
        return layers
    report.warnings.append(
        f"{about}: its spectrum would be off by about {error:.0%} here, so only its rotation is applied. With that "
        "model at hand, SODA Convert makes a LoRA or full difference of it, and SODA Transport fits it to this model."
    )
    return rotation_only(layers)
