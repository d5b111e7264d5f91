"""Does an adapter fit a ComfyUI model, and what does the node say if not quite?

Layers are matched by name and shape. Where the sketches call the spectrum wrong on this base, the node says it, or
applies only the rotation and says so (`soda.fit` has the estimate and its thresholds).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...adapter import Adapter, Layer
from ...errors import SodaMixError
from ...fingerprint import joint_hash
from ...fit import REFUSED_ERROR, SILENT_ERROR, misfit, rotation_only, spectrum_error
from .base import ModelBases, part_shape, split_name

REMEMBERED = 1000
Parts = Sequence[tuple[Adapter, Mapping[str, tuple[Layer, ...]]]]  # an adapter, and its layers that have a place
_ERRORS: dict[str, float | None] = {}  # by adapter and weights


@dataclass
class Report:
    """What applying adapters did: counts of layers, names that found no place, sentences for the user."""

    changed: int = 0
    bypassed: int = 0  # of these, beside a weight that stays as it is
    unmatched: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def text(self) -> str:
        lines = [f"{self.changed} layer{'' if self.changed == 1 else 's'} changed"]
        if self.bypassed:
            lines[0] += ", all in bypass" if self.bypassed == self.changed else f", {self.bypassed} of them in bypass"
        if self.unmatched:
            shown = ", ".join(self.unmatched[:3])
            more = f" and {len(self.unmatched) - 3} more" if len(self.unmatched) > 3 else ""
            lines.append(f"{len(self.unmatched)} keys did not match: {shown}{more}")
        return "\n".join(lines + self.warnings)


@dataclass
class Matching:
    """Layers of an adapter sorted by what a model of certain shapes has for them."""

    fitting: dict[str, tuple[Layer, ...]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)  # the weight is there, and why its shape does not fit
    absent: list[str] = field(default_factory=list)


def matchings(adapters: Iterable[Adapter], known: Mapping[str, tuple[int, ...]]) -> list[Matching]:
    """`matching` of each; those of one form match alike."""
    by_form: dict[tuple, Matching] = {}
    result = []
    for adapter in adapters:
        match = by_form.get(adapter.form)
        if match is None:
            match = by_form[adapter.form] = matching(adapter, known)
        result.append(replace(match, fitting={name: adapter.layers[name] for name in match.fitting}))
    return result


def matching(adapter: Adapter, known: Mapping[str, tuple[int, ...]]) -> Matching:
    """Sort the adapter's layers against a model's weights, given by key and shape."""
    result = Matching()
    for name, terms in adapter.layers.items():
        key, rows = split_name(name)
        shape = known.get(key)
        if shape is None or (rows is not None and rows[1] > shape[0]):
            result.absent.append(name)
            continue
        reason = misfit(terms, part_shape(shape, rows))
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


def spectrum_errors(parts: Parts, bases: ModelBases) -> list[float | None]:
    """How far each adapter's D is off on this base (`soda.fit.spectrum_error`); looked at once for a base."""
    if len(_ERRORS) > REMEMBERED:
        _ERRORS.clear()
    checked = [tuple(name for name, _ in _sketched(layers)) for _, layers in parts]
    weights = {names: joint_hash({name: bases.hashes[name] for name in names}) for names in set(checked)}
    keys = [
        f"{adapter.content_hash} {adapter.sketch_hash} {weights[names]}"
        for (adapter, _), names in zip(parts, checked, strict=True)
    ]
    unknown = {
        key: [((name, term.decomposition), term) for name, term in _sketched(layers)]
        for key, (_, layers) in zip(keys, parts, strict=True)
        if key not in _ERRORS
    }
    found = bases.found({place for terms in unknown.values() for place, _ in terms})
    for key, terms in unknown.items():
        _ERRORS[key] = spectrum_error((term, found[place]) for place, term in terms)
    return [_ERRORS[key] for key in keys]


def _sketched(layers: Mapping[str, tuple[Layer, ...]]) -> Iterator[tuple[str, Layer]]:
    """The terms that can be checked."""
    return (
        (name, term)
        for name, terms in layers.items()
        for term in terms
        if term.delta is not None and term.sketch is not None
    )


def fit_to_apply(
    adapter: Adapter, layers: Mapping[str, tuple[Layer, ...]], error: float | None, report: Report
) -> Mapping[str, tuple[Layer, ...]]:
    """The layers to apply where D is off by `error`; what the user must know goes to `report.warnings`."""
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
