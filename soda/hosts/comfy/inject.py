"""Adapted weights inside a loaded ComfyUI model for the length of a training run, and none after it.

The model's parameters are never written: each target module gets a weight function that returns the adapted weight
of this step. ComfyUI calls inject and eject around its own loading and unloading, so both stay possible meanwhile.

Weights that ComfyUI has left in main memory come through buffers that the next module's weights overwrite, while a
backward pass still needs them: their modules get a weight function that copies. Blocks are computed again (`blocks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import PatcherInjection

from ...adapter import split_rows
from ...training.layerwise import LayerByLayer
from ...training.recompute import recomputed
from .base import alias, unpatched
from .blocks import blocks

KEY = "soda_training"


class Injection:
    """Context manager around training on `patcher`; `weights` (layer name -> tensor) is what the model computes with,
    its own where that is empty.

    A weight that carries patches of others (a LoRA) keeps what they add: W = adapted + (patched - W0). With `again` the
    network's blocks keep no activations for the backward pass but compute them again.
    """

    def __init__(self, patcher: ModelPatcher, targets: Mapping[str, str], again: bool = False):
        self.patcher = patcher
        self.targets = targets
        self.weights: Mapping[str, torch.Tensor] = {}
        self._layers: dict[str, list[str]] = {}  # state dict key -> the layers in its rows
        for layer, key in targets.items():
            self._layers.setdefault(key, []).append(layer)
        self._bases = {key: unpatched(patcher, key) for key in self._layers if key in patcher.patches}
        self._blocks = blocks(patcher.model, [key.removesuffix(".weight") for key in self._layers]) if again else {}
        self._undo: list[Callable[[], object]] = []

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
                        self._undo.append(partial(held.__setitem__, name, tensor))
                        held[name] = alias(tensor)
            if hasattr(module, "weight_function"):
                for part in ("weight", "bias"):
                    tensor = getattr(module, part, None)
                    if tensor is not None and tensor.device != patcher.load_device:
                        self._add(module, part, torch.clone)
        for key in self._layers:
            self._add(comfy.utils.get_attr(patcher.model, key.removesuffix(".weight")), "weight", self._function(key))
        for block in self._blocks.values():
            self._undo.append(partial(block.__dict__.pop, "forward"))
            block.forward = partial(self._run_block, block.forward)

    def _run_block(self, forward: Callable, *args, **kwargs):
        weights = self.weights

        def run(*args, **kwargs):
            self.weights = weights  # those of this pass, whichever came between it and the backward pass
            return forward(*args, **kwargs)

        return recomputed(run, *args, **kwargs)

    def _add(self, module: torch.nn.Module, part: str, function: Callable) -> None:
        """One more of ComfyUI's functions on a module's weight or bias."""
        name = f"{part}_function"
        before = getattr(module, name)
        self._undo.append(partial(setattr, module, name, before))
        setattr(module, name, [*before, function])

    def _eject(self, _: ModelPatcher) -> None:
        for put_back in reversed(self._undo):
            put_back()
        self._undo.clear()

    def _function(self, key: str):
        base = self._bases.get(key)
        if base is not None and not self._blocks:
            base = base.to(self.patcher.load_device)  # once: from main memory it would come anew in every step
        layers = sorted((split_rows(layer)[1] or (0, 0), layer) for layer in self._layers[key])

        def adapted(weight: torch.Tensor) -> torch.Tensor:
            if not self.weights:
                return weight
            new = self._whole(weight, layers, base is None)
            if base is not None:
                new = new + (weight.float() - base.to(device=weight.device, dtype=torch.float32))
            return new.to(weight.dtype)

        return adapted

    def _layer(self, layer: str, weight: torch.Tensor, untouched: bool) -> torch.Tensor:
        """The adapted weight of a layer, which the model has as `weight`, its base weight if `untouched`."""
        if untouched and isinstance(self.weights, LayerByLayer):
            return self.weights.on(layer, weight.flatten(1)).reshape(weight.shape)
        return self.weights[layer].reshape(weight.shape)

    def _whole(self, weight: torch.Tensor, layers: list[tuple[tuple[int, int], str]], untouched: bool) -> torch.Tensor:
        """The weight of a module from those of its layers; rows that no layer has are the weight's own."""
        if layers[0][0] == (0, 0):
            return self._layer(layers[0][1], weight, untouched)
        parts, at = [], 0
        for (start, end), layer in layers:
            parts += [weight[at:start].float(), self._layer(layer, weight[start:end], untouched)]
            at = end
        return torch.cat([*parts, weight[at:].float()])
