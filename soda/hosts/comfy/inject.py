"""Adapted weights inside a loaded ComfyUI model for the length of a training run, and none after it.

The model's parameters are never written: each target module gets a weight function that returns the adapted weight
of this step. ComfyUI calls inject and eject around its own loading and unloading, so both stay possible meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import PatcherInjection
from comfy.quant_ops import QuantizedTensor

from ...adapter import split_rows
from .base import unpatched
from .quantised import with_parts

KEY = "soda_training"


class Injection:
    """Context manager around training on `patcher`; `weights` (layer name -> tensor) is what the model computes with.

    A weight that carries patches of others (a LoRA) keeps what they add: W = adapted + (patched - W0).
    """

    def __init__(self, patcher: ModelPatcher, targets: Mapping[str, str]):
        self.patcher = patcher
        self.targets = targets
        self.weights: Mapping[str, torch.Tensor] = {}
        self._layers: dict[str, list[str]] = {}  # state dict key -> the layers in its rows
        for layer, key in targets.items():
            self._layers.setdefault(key, []).append(layer)
        self._bases = {key: unpatched(patcher, key) for key in self._layers if key in patcher.patches}
        self._undo: list = []

    def __enter__(self) -> Injection:
        self.patcher.set_injections(KEY, [PatcherInjection(inject=self._inject, eject=self._eject)])
        self.patcher.inject_model()
        return self

    def __exit__(self, *_) -> None:
        self.patcher.eject_model()
        self.patcher.remove_injections(KEY)
        self.weights = {}

    def _inject(self, patcher: ModelPatcher) -> None:
        for module in patcher.model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in list(held.items()):
                    if tensor is not None and tensor.is_inference():
                        self._undo.append((held, name, tensor))
                        held[name] = _alias(tensor)
        for key in self._layers:
            module = comfy.utils.get_attr(patcher.model, key.removesuffix(".weight"))
            self._undo.append((module.__dict__, "weight_function", module.weight_function))
            module.weight_function = [*module.weight_function, self._function(key)]

    def _eject(self, _: ModelPatcher) -> None:
        for place, name, value in reversed(self._undo):
            place[name] = value
        self._undo.clear()

    def _function(self, key: str):
        base = self._bases.get(key)
        layers = sorted((split_rows(layer)[1] or (0, 0), layer) for layer in self._layers[key])

        def adapted(weight: torch.Tensor) -> torch.Tensor:
            new = self._whole(weight, layers)
            if base is not None:
                new = new + (weight.float() - base.to(device=weight.device, dtype=torch.float32))
            return new.to(weight.dtype)

        return adapted

    def _whole(self, weight: torch.Tensor, layers: list[tuple[tuple[int, int], str]]) -> torch.Tensor:
        """The weight of a module from those of its layers; rows that no layer has are the weight's own."""
        if layers[0][0] == (0, 0):
            return self.weights[layers[0][1]].reshape(weight.shape)
        parts, at = [], 0
        for (start, end), layer in layers:
            parts += [weight[at:start].float(), self.weights[layer].reshape(end - start, *weight.shape[1:])]
            at = end
        return torch.cat([*parts, weight[at:].float()])


def _alias(held: torch.Tensor) -> torch.Tensor:
    """The same memory as a normal tensor: one made under inference mode cannot be saved for backward."""
    if isinstance(held, QuantizedTensor):
        return torch.nn.Parameter(with_parts(held, _alias), requires_grad=False)
    with torch.inference_mode(False):
        tensor = torch.empty(0, dtype=held.dtype, device=held.device)
        tensor.set_(held.untyped_storage(), held.storage_offset(), held.shape, held.stride())
        return torch.nn.Parameter(tensor, requires_grad=False) if isinstance(held, torch.nn.Parameter) else tensor
