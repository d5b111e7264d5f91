"""Adapters beside a weight that stays as it is: for quantised weights, which a merged adapter would round once more.

    y = x W^T + b,  W = R_out (W0 + D) R_in^T + T      T: what LoRAs and the like add to W0
      = [f(z) - t(z) + z D^T - b] R_out^T + b + t(x)   z = x R_in,  f(z) = z (W0 + T)^T + b,  t(z) = z T^T

f is the module's own forward, with all that ComfyUI does there for a quantised or offloaded weight. t comes from the
patches on the weight, so that a LoRA means the same before and behind SODA. R is applied factor by factor; D is kept
as a dense matrix in the dtype the model computes in. Exponentials and D are made once, when the adapter is put on.

ComfyUI calls inject and eject around its own loading. The D are an additional model of the patcher's, so that they
are counted, loaded and offloaded as all models are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.ops
import torch
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from comfy.patcher_extension import PatcherInjection
from comfy.quant_ops import QuantizedTensor
from comfy.utils import get_attr
from torch import Tensor, nn

from ...adapter import Decomposition, Layer
from ...decomposition import Basis, spectral_change
from ...kronecker import rotate
from ...rotation import Logarithms
from .added import Product, added
from .base import layer_shape, split_name
from .quantised import is_quantised

KEY = "soda_bypass"
Terms = Mapping[str, Sequence[Layer]]  # by layer name
Rows = tuple[int, int] | None


class Turn(NamedTuple):
    """What one layer does in its module: factors of R_in^T and R_out ([] for no rotation), and which D is its own."""

    rows: Rows
    inputs: list[Tensor]
    outputs: list[Tensor]
    spectrum: int | None


def bypassed(patcher: ModelPatcher, layers: Sequence[str], mode: str) -> list[str]:
    """The layers to leave out of the weights: none for `merge`; for `auto` those whose weight is quantised; for
    `bypass` all but convolutions, whose weights are merged in any mode."""
    if mode == "merge":
        return []
    found = []
    for name in layers:
        key, _ = split_name(name)
        module = get_attr(patcher.model, key.removesuffix(".weight"))
        wanted = mode == "bypass" or is_quantised(module.weight)
        if wanted and isinstance(module, comfy.ops.CastWeightBiasOp) and len(module.weight.shape) == 2:
            found.append(name)
    return found


@torch.inference_mode(False)  # a training may run through these
@torch.no_grad()
def install(clone: ModelPatcher, layers: Terms, bases: Mapping[tuple[str, Decomposition], Basis]) -> None:
    """Let a patcher compute with these layers in bypass, and with none that it had before."""
    dtype = compute_dtype(clone)
    spectra = nn.ModuleList()
    turns: dict[str, Turn] = {}
    like = torch.empty(0, device=clone.load_device, dtype=dtype)
    for name, found in Logarithms.of(layers, like.device).rotations(dtype=dtype).items():
        inputs = [factor.mT for factor in found.input.made(like)]  # x R is a rotation by R^T
        outputs = list(found.output.made(like))
        change = _change(clone, name, layers[name], bases)
        if change is not None:
            spectra.append(_linear(change.to(dtype)))
        turns[name] = Turn(split_name(name)[1], inputs, outputs, None if change is None else len(spectra) - 1)
    clone.remove_additional_models(KEY)
    if len(spectra):
        comfy.model_management.archive_model_dtypes(spectra)
        clone.set_additional_models(KEY, [CoreModelPatcher(spectra, clone.load_device, clone.offload_device)])
    _inject(clone, layers, turns)


def installed(patcher: ModelPatcher) -> Terms:
    """The layers that a patcher has in bypass."""
    found = patcher.get_attachment(KEY)
    return {} if found is None else found[0]


def take_off(patcher: ModelPatcher, names: Iterable[str]) -> None:
    """Leave these layers out from now on."""
    if installed(patcher):
        layers, turns = patcher.get_attachment(KEY)
        kept = layers.keys() - set(names)
        _inject(patcher, {name: layers[name] for name in kept}, {name: turns[name] for name in kept})


def _inject(patcher: ModelPatcher, layers: Terms, turns: Mapping[str, Turn]) -> None:
    patcher.set_attachments(KEY, (layers, turns))
    patcher.remove_injections(KEY)
    if turns:
        injection = _Injection(turns)
        # First, so that what other bypass loaders add sees the module's true input.
        patcher.injections = {KEY: [PatcherInjection(injection.inject, injection.eject)], **patcher.injections}


def compute_dtype(patcher: ModelPatcher) -> torch.dtype:
    """What a diffusion model computes in; text encoders mostly do in fp32."""
    return patcher.model.get_dtype_inference() if hasattr(patcher.model, "get_dtype_inference") else torch.float32


def _change(
    patcher: ModelPatcher, name: str, terms: Sequence[Layer], bases: Mapping[tuple[str, Decomposition], Basis]
) -> Tensor | None:
    """D (rows, in) of a layer, fp32 on the CPU; for lq without the rows below, which are 0. None if there is none."""
    live = [term for term in terms if term.delta is not None and term.delta.count_nonzero()]
    if not live:
        return None
    shape = layer_shape(patcher, name)
    weight = torch.empty(shape, device="meta")  # only its shape is looked at
    change = torch.zeros(shape)
    for term in live:
        assert term.delta is not None
        change += spectral_change(bases[name, term.decomposition], term.delta, weight)
    return change[: min(shape)].clone() if all(term.decomposition == "lq" for term in live) else change


def _linear(weight: Tensor) -> nn.Module:
    linear = comfy.ops.manual_cast.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class _Injection:
    """Forwards of the modules of a patcher's model, swapped while ComfyUI has it injected.

    Modules are looked up by the patcher at hand: ComfyUI may rebuild the model for a clone (hooks, torch.compile).
    """

    def __init__(self, turns: Mapping[str, Turn]):
        self.turns: dict[str, list[Turn]] = {}  # by key
        for name, turn in turns.items():
            self.turns.setdefault(split_name(name)[0], []).append(turn)
        self._undo: WeakKeyDictionary = WeakKeyDictionary()  # model -> [(module, its forward before, ours, switch)]

    def inject(self, patcher: ModelPatcher) -> None:
        held = patcher.get_additional_models_with_key(KEY)
        hooked = patcher.get_combined_hook_patches(patcher.current_hooks)
        undo = self._undo.setdefault(patcher.model, [])
        for key, turns in self.turns.items():
            module = get_attr(patcher.model, key.removesuffix(".weight"))
            before: Any = module.__dict__.get("forward")
            while hasattr(before, "soda_before") and not before.soda_switch:
                before = before.soda_before
            switch = [True]
            entries = [*patcher.patches.get(key, ()), *hooked.get(key, ())]
            extra = added(entries, module, patcher.load_device, compute_dtype(patcher))
            original = module.forward if before is None else before
            forward: Any = _forward(module, original, turns, held[0].model if held else (), switch, extra)
            forward.soda_before, forward.soda_switch = before, switch
            module.forward = forward
            undo.append((module, before, forward, switch))

    def eject(self, patcher: ModelPatcher) -> None:
        for module, before, forward, switch in reversed(self._undo.pop(patcher.model, [])):
            switch.clear()  # where another bypass still wraps this forward it takes it for the module's own
            if module.__dict__.get("forward") is forward:
                if before is None:
                    del module.forward
                else:
                    module.forward = before


def _forward(
    module: Any, original: Callable, turns: Sequence[Turn], spectra: Any, switch: list, extra: Product | None
) -> Callable:
    """The module's forward with its layers' rotations and spectra, while there is something in `switch`."""

    def bypass(x: Tensor, *args, **kwargs) -> Tensor:
        if not switch:
            return original(x, *args, **kwargs)
        if turns[0].rows is None:
            return _turned(x, turns[0], lambda z: original(z, *args, **kwargs), module.bias, spectra, extra)
        return _by_rows(module, x, turns, spectra, extra)

    return bypass


def _rotated(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """x R^T of an x (..., N); x itself for no factors."""
    return rotate(x.flatten(0, -2), [factor.to(x) for factor in factors]).reshape(x.shape) if factors else x


def _turned(
    x: Tensor, turn: Turn, product: Product, bias: Tensor | None, spectra: Any, extra: Product | None
) -> Tensor:
    """One layer's y (see above); `product` is f, `extra` is t, both for the layer's rows."""
    z = _rotated(x, turn.inputs)
    y = product(z)
    if turn.spectrum is not None:
        change = spectra[turn.spectrum](z)
        y[..., : change.shape[-1]] += change
    if turn.outputs:
        turned = extra(z) if extra is not None else 0.0
        fixed = 0.0 if bias is None else bias.to(y).as_subclass(Tensor)
        y = _rotated(y - turned - fixed, turn.outputs) + fixed
        return y if extra is None else y + extra(x)
    return y if extra is None else y + extra(x - z)


def _by_rows(module: Any, x: Tensor, turns: Sequence[Turn], spectra: Any, extra: Product | None) -> Tensor:
    """y of a fused weight: unpacked once, multiplied piece by piece, as each piece takes an input of its own."""
    stream = None
    if hasattr(module, "cast_bias_weight"):  # GGUF
        weight, bias = module.cast_bias_weight(x)
    else:
        weight, bias, stream = comfy.ops.cast_bias_weight(module, x, offloadable=True)
    weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
    pieces, at, rest = [], 0, Turn(None, [], [], None)

    def piece(start: int, end: int, turn: Turn) -> None:
        rows = slice(start, end)
        own = None if bias is None else bias[rows]
        part = None if extra is None or turn is rest else (lambda z: extra(z)[..., rows])
        pieces.append(_turned(x, turn, lambda z: nn.functional.linear(z, weight[rows], own), own, spectra, part))

    for turn in sorted(turns, key=lambda turn: turn.rows or ()):
        start, end = turn.rows or (0, 0)
        if at < start:
            piece(at, start, rest)
        piece(start, end, turn)
        at = end
    if at < weight.shape[0]:
        piece(at, weight.shape[0], rest)
    if stream is not None:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)
    return torch.cat(pieces, -1)
