"""Adapters onto a ComfyUI model, through ModelPatcher patches alone.

All SODA adapters on one MODEL are remembered on it (an attachment) and fold into one mix that stands first in each
weight's patch list: W = (W0 + sum D) R^T + sum LoRA. So the order of SODA nodes, and of SODA and LoRA nodes, does
not matter, and unpatching, low VRAM and dynamic VRAM come from core.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import WeightAdapterBase

from ...adapt import adapt
from ...adapter import Adapter, Layer
from ...decomposition import Basis
from ...mixing import mix
from . import bypass
from .base import bases, layer_weight, matrix_shape, split_name
from .fit import Report, check_spectrum, matching, shapes, unmatched

ATTACHMENT = "soda"
MODE = "soda_mode"
MODES = ("auto", "merge", "bypass")
Parts = Sequence[tuple[Adapter, float]]


class SodaWeightAdapter(WeightAdapterBase):
    """The adaptation of one weight as core patches carry it.

    `weights` holds one tuple per term: (decomposition, delta, logs, left, right, spectrum, live). Core copies such
    tuples tensor by tensor to a device and rebuilds the object as type(a)(loaded_keys, weights), so nothing may
    live in other attributes. The weight it gets is W0, since SODA patches stand first.
    """

    name = "soda"

    def __init__(self, loaded_keys: set[str], weights: tuple):
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def of(cls, layer: str, terms: Sequence[Layer], basis: dict) -> SodaWeightAdapter:
        """Terms of one layer with the bases that their spectra need, by (layer, decomposition)."""
        packed = []
        for term in terms:
            b = basis.get((layer, term.decomposition))
            vectors = (None, None, None, None) if b is None else (b.left, b.right, b.spectrum, b.live)
            packed.append((term.decomposition, term.delta, tuple(term.logs), *vectors))
        return cls({layer}, tuple(packed))

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, intermediate_dtype=torch.float32,
        original_weight=None,
    ):  # fmt: skip
        """Write the adapted weight into `weight`, (out, in) or (out, in, 1, 1), any dtype, and return it; fp32
        arithmetic."""

        def here(tensor: Any) -> Any:  # a tensor or None
            return None if tensor is None else tensor.to(weight.device)

        layers, basis = [], {}
        for decomposition, delta, logs, left, right, spectrum, live in self.weights:
            layer = Layer(decomposition, here(delta), tuple(here(log) for log in logs))
            layers.append(layer if strength == 1.0 else layer.scaled(strength))
            if spectrum is not None:
                basis[decomposition] = Basis(decomposition, here(left), here(right), here(spectrum), here(live))
        matrix = weight.reshape(matrix_shape(weight.shape)).float()
        # With an offset core drops the returned tensor and keeps its own, hence in place.
        return weight.copy_(adapt(matrix, layers, basis).reshape(weight.shape))


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
    for adapter, _ in parts:
        report.unmatched += unmatched(adapter, [matching(adapter, k) for k in known], type(model.model).__name__)
    new_model = _fold(model, parts, known[0], report, mode)
    if clip is None:
        return new_model, None, report
    new_clip = clip.clone()
    new_clip.patcher = _fold(clip.patcher, parts if clip_parts is None else clip_parts, known[1], report, mode)
    return new_model, new_clip, report


def _fold(patcher: ModelPatcher, parts: Parts, known: dict, report: Report, mode: str) -> ModelPatcher:
    """A clone of `patcher` whose SODA patches are the mix of the attached parts and the new ones."""
    before = attached(patcher)
    together = [(adapter, weight) for adapter, weight in (*before, *parts) if weight != 0.0]
    clone = patcher.clone()
    if len(together) == len(before):
        report.bypassed += len(bypass.installed(clone))
        report.changed += len(bypass.installed(clone))
        report.changed += sum(_is_soda(entry) for entries in clone.patches.values() for entry in entries)
        return clone
    clone.set_attachments(ATTACHMENT, tuple(together))
    mode = (patcher.get_attachment(MODE) or mode) if mode == "auto" else mode
    clone.set_attachments(MODE, mode)
    fitting = [(adapter, matching(adapter, known).fitting, weight) for adapter, weight in together]
    basis = bases(
        patcher,
        ((name, t.decomposition) for _, layers, _ in fitting for name, ts in layers.items() for t in ts if
         t.delta is not None),
    )  # fmt: skip
    weights = {name: layer_weight(patcher, name) for name, _ in basis}
    checked = [
        (Adapter(check_spectrum(adapter, layers, basis, weights, report), adapter.metadata, adapter.name), weight)
        for adapter, layers, weight in fitting
        if layers
    ]
    mixed = mix(checked).layers if checked else {}
    beside = {name: mixed[name] for name in bypass.bypassed(patcher, list(mixed), mode)}
    bypass.install(clone, beside, basis)
    patches = {}
    for name, terms in mixed.items():
        if name in beside:
            continue
        key, rows = split_name(name)
        target = key if rows is None else (key, (0, rows[0], rows[1] - rows[0]))
        patches[target] = SodaWeightAdapter.of(name, terms, basis)
    _replace(clone, patches)
    report.changed += len(mixed)
    report.bypassed += len(beside)
    return clone


def _is_soda(entry: tuple) -> bool:
    return isinstance(entry[1], SodaWeightAdapter)


def _replace(clone: ModelPatcher, patches: dict) -> None:
    """Take the old SODA patches off and put the new ones before all others."""
    for key in list(clone.patches):
        clone.patches[key] = [entry for entry in clone.patches[key] if not _is_soda(entry)]
        if not clone.patches[key]:
            del clone.patches[key]
    clone.add_patches(patches)
    for key, entries in clone.patches.items():
        clone.patches[key] = sorted(entries, key=lambda entry: not _is_soda(entry))  # stable: others keep their order
