"""Adapters onto a ComfyUI model, through ModelPatcher patches alone.

All SODA adapters on one MODEL are remembered on it (an attachment) and fold into one mix that stands first in each
weight's patch list: W = (W0 + sum D) R^T + sum LoRA. So the order of SODA nodes, and of SODA and LoRA nodes, does
not matter, and unpatching, low VRAM and dynamic VRAM come from core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import WeightAdapterBase

from ...adapter import Adapter, Layer
from ...mixing import mix
from . import bypass
from .base import ModelBases, matrix_shape, shapes, split_name
from .fit import Matching, Report, fit_to_apply, matchings, spectrum_errors, unmatched
from .fold import Fold
from .prompt_cache import forget_around_runs

ATTACHMENT = "soda"
MODE = "soda_mode"
MODES = ("auto", "merge", "bypass")
Parts = Sequence[tuple[Adapter, float]]
Placed = tuple[Adapter, Mapping[str, tuple[Layer, ...]], float]  # the layers that have a place in a network
SOMETHING = torch.zeros(1)


class SodaWeightAdapter(WeightAdapterBase):
    """The adaptation of one weight as core patches carry it.

    `weights` is (fold, layer, SOMETHING). Core rebuilds the object as type(a)(loaded_keys, weights), so nothing may
    live in other attributes. With dynamic VRAM it copies the tensors among the weights into memory pinned anew for
    every prompt, which for bases would take longer than adapting, and fails where there are none. The weight it gets is
    W0, since SODA patches stand first.
    """

    name = "soda"

    def __init__(self, loaded_keys: set[str], weights: tuple):
        self.loaded_keys = loaded_keys
        self.weights = weights

    @property
    def terms(self) -> tuple[Layer, ...]:
        """What it applies at strength 1."""
        fold, layer, _ = self.weights
        return fold.mix.layers[layer]

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, intermediate_dtype=torch.float32,
        original_weight=None,
    ):  # fmt: skip
        """The adapted weight of a `weight` (out, in) or (out, in, 1, 1), any dtype, whose numbers may be lost; fp32
        arithmetic."""
        if strength == 0.0:
            return weight
        fold, layer, _ = self.weights
        # Core merges with fp32 between patches, and patches what it is about to use with the weight's own dtype.
        repeated = intermediate_dtype == weight.dtype != torch.float32
        adapted = fold.adapted(layer, weight.reshape(matrix_shape(weight.shape)), strength, repeated)
        adapted = adapted.reshape(weight.shape)
        # With an offset core drops the returned tensor and keeps its own, hence in place; and models keep their layout.
        own = offset is None and adapted.dtype == weight.dtype and adapted.is_contiguous()
        return adapted if own else weight.copy_(adapted)


def attached(patcher: ModelPatcher) -> Parts:
    """The SODA adapters and weights on a model."""
    return patcher.get_attachment(ATTACHMENT) or ()


def apply(model: ModelPatcher, parts: Parts, clip=None, clip_parts: Parts | None = None, mode: str = "auto"):
    """(model, clip, Report) with `parts` added to what SODA put there before; the inputs stay as they are.

    `clip_parts` are the same adapters with their weights for the CLIP, where these are others. Weight 0 adds nothing,
    so that the base is kept bit for bit. A layer of the adapter belongs to the MODEL or the CLIP by its name. An
    adapter that does not fit raises SodaMixError. `mode` is one of MODES (see `bypass.bypassed`) and holds for all SODA
    adapters on the model; auto keeps what another node has set.
    """
    targets = [model] if clip is None else [model, clip.patcher]
    known = [shapes(patcher) for patcher in targets]
    report = Report()
    matches = [matchings([adapter for adapter, _ in parts], k) for k in known]
    for (adapter, _), *found in zip(parts, *matches, strict=True):
        report.unmatched += unmatched(adapter, found, type(model.model).__name__)
    new_model = _fold(model, _placed(parts, matches[0]), known[0], report, mode)
    if clip is None:
        if any(not name.startswith("diffusion_model.") for name in report.unmatched):
            report.warnings.append("Wire clip to use the layers that belong to a text encoder.")
        return new_model, None, report
    new_clip = clip.clone()
    placed = _placed(parts if clip_parts is None else clip_parts, matches[1])
    new_clip.patcher = _fold(clip.patcher, placed, known[1], report, mode)
    return new_model, new_clip, report


def _placed(parts: Parts, matches: Sequence[Matching]) -> list[Placed]:
    return [(adapter, match.fitting, weight) for (adapter, weight), match in zip(parts, matches, strict=True)]


def _fold(patcher: ModelPatcher, new: Sequence[Placed], known: dict, report: Report, mode: str) -> ModelPatcher:
    """A clone of `patcher` whose SODA patches are the mix of the attached parts and the new ones."""
    before = attached(patcher)
    old = _placed(before, matchings([adapter for adapter, _ in before], known))
    placed = [one for one in (*old, *new) if one[-1] != 0.0]
    together = [(adapter, weight) for adapter, _, weight in placed]
    clone = patcher.clone()
    if len(together) == len(before):
        report.bypassed += len(bypass.installed(clone))
        report.changed += len(bypass.installed(clone))
        report.changed += sum(_is_soda(entry) for entries in clone.patches.values() for entry in entries)
        return clone
    clone.set_attachments(ATTACHMENT, tuple(together))
    mode = (patcher.get_attachment(MODE) or mode) if mode == "auto" else mode
    clone.set_attachments(MODE, mode)
    wanted = {
        (name, term.decomposition)
        for _, layers, _ in placed
        for name, terms in layers.items()
        for term in terms
        if term.delta is not None
    }
    bases = ModelBases(patcher, wanted, known)
    errors = spectrum_errors([(adapter, layers) for adapter, layers, _ in placed], bases)
    checked = [
        (_with_layers(adapter, fit_to_apply(adapter, layers, error, report)), weight)
        for (adapter, layers, weight), error in zip(placed, errors, strict=True)
        if layers
    ]
    strength, unit = _factored(checked)
    mixed = mix(unit) if unit else Adapter({})
    names = bypass.bypassed(patcher, list(mixed.layers), mode)
    beside = {name: tuple(term.scaled(strength) for term in mixed.layers[name]) for name in names}
    bypass.install(clone, beside, dict(bases.each({(n, t.decomposition) for n, ts in beside.items() for t in ts if
                                                   (n, t.decomposition) in wanted})))  # fmt: skip
    merged = replace(mixed, layers={name: terms for name, terms in mixed.layers.items() if name not in beside})
    source = tuple((adapter.content_hash, weight) for adapter, weight in unit)
    fold = Fold.of(merged, bases, (source, frozenset(beside)))
    report.warnings += bases.warnings() if fold.wanted else []
    patches = {}
    for name in merged.layers:
        key, rows = split_name(name)
        target = key if rows is None else (key, (0, rows[0], rows[1] - rows[0]))
        patches[target] = SodaWeightAdapter({name}, (fold, name, SOMETHING))
    _replace(clone, patches, strength)
    forget_around_runs(clone)
    report.changed += len(mixed.layers)
    report.bypassed += len(beside)
    return clone


def _factored(parts: Parts) -> tuple[float, Parts]:
    """(s, parts) whose mix at strength s is that of the given ones: of a lone adapter its weight, which may change from
    one run to the next when nothing else does."""
    if len(parts) != 1:
        return 1.0, parts
    ((adapter, weight),) = parts
    return weight, [(adapter, 1.0)]


def _with_layers(adapter: Adapter, layers: Mapping[str, tuple[Layer, ...]]) -> Adapter:
    """The adapter itself where these are all it has: it knows its hash already."""
    own = adapter.layers
    whole = len(layers) == len(own) and all(layers[name] is terms for name, terms in own.items())
    return adapter if whole else replace(adapter, layers=layers)


def _is_soda(entry: tuple) -> bool:
    return isinstance(entry[1], SodaWeightAdapter)


def _replace(clone: ModelPatcher, patches: dict, strength: float) -> None:
    """Take the old SODA patches off and put the new ones before all others."""
    for key in list(clone.patches):
        clone.patches[key] = [entry for entry in clone.patches[key] if not _is_soda(entry)]
        if not clone.patches[key]:
            del clone.patches[key]
    clone.add_patches(patches, strength)
    for key, entries in clone.patches.items():
        clone.patches[key] = sorted(entries, key=lambda entry: not _is_soda(entry))  # stable: others keep their order
