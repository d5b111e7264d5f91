"""The unpatched weights of a ComfyUI model as `convert` and `transport` read a base: one by one, by layer name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ...convert.base import ATTENTION
from ...errors import SodaMixError
from .base import layer_weight, matrix_shape, split_name
from .describe import base_name


class ModelWeights:
    """`convert.base.Weights` of a model in memory: matrices `(out, in)` in the model's own dtype; `path` is the name of
    its checkpoint, for messages.

    Raises SodaMixError for a layer that the model lacks.
    """

    def __init__(self, patcher: ModelPatcher):
        self.patcher = patcher
        self.path = Path(base_name(patcher))
        self._shapes = {key: tuple(weight.shape) for key, weight in patcher.model.named_parameters()}

    def stored_shape(self, layer: str) -> tuple[int, ...]:
        key, rows = split_name(layer)
        if key not in self._shapes or (rows is not None and rows[1] > self._shapes[key][0]):
            raise SodaMixError(
                f"The model {self.path} has no weight for the adapter's layer {layer!r}: wire a model of the "
                "architecture that it was made for. (Layers of text encoders are converted by the command `soda`.)"
            )
        shape = self._shapes[key]
        return shape if rows is None else (rows[1] - rows[0], *shape[1:])

    def shape(self, layer: str) -> tuple[int, int]:
        shape = matrix_shape(self.stored_shape(layer))
        if len(shape) != 2:
            raise SodaMixError(f"The weight of layer {layer!r} in {self.path} is {shape}, which is no matrix.")
        return shape[0], shape[1]

    def __getitem__(self, layer: str) -> torch.Tensor:
        self.shape(layer)
        return layer_weight(self.patcher, layer)

    def attention(self) -> list[str]:
        layers = (key.removesuffix(".weight") for key in self._shapes if key.endswith(".weight"))
        return [layer for layer in layers if ATTENTION.fullmatch(layer)]


def progress(layers: int) -> Callable[[int, int], None]:
    """A bar on the node that runs, for (done, of); the prompt can be cancelled between two layers."""
    bar = comfy.utils.ProgressBar(layers)

    def show(done: int, of: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, of)

    return show
