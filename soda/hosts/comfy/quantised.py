"""Weights stored in fewer bits than they are computed in: ComfyUI's own formats, bare fp8, GGUF.

GGUF tensors come from the pack ComfyUI-GGUF: a subclass of Tensor over packed bytes that carries `tensor_type`,
`tensor_shape` (its `shape`) and the patches on it; the module that holds it unpacks it by `get_weight`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

# By layout: kernels of 4 bit weights without a derivative. The second came after ComfyUI 0.30.
WITHOUT_DERIVATIVE = {"TensorCoreConvRotW4A4Layout": "convrot_w4a4", "AsymW4A8Int8Layout": "asym_w4a8_int8"}


def is_gguf(weight: Tensor) -> bool:
    return hasattr(weight, "tensor_type")


def is_quantised(weight: Tensor) -> bool:
    """Whether storing a changed weight again would round it to 8 bits or fewer."""
    return isinstance(weight, QuantizedTensor) or weight.element_size() == 1


def untrainable(weight: Any) -> str | None:
    """The name of a format that no training can run through: GGUF modules ask for no weight function, and some
    kernels have no derivative."""
    if is_gguf(weight):
        return "GGUF"
    return WITHOUT_DERIVATIVE.get(getattr(weight, "_layout_cls", ""))


def dequantised_gguf(module: Any, weight: Any) -> Tensor:
    """The numbers of a GGUF weight of `module`, fp32, without the patches on it."""
    bare = weight.as_subclass(type(weight))
    bare.tensor_type, bare.tensor_shape, bare.patches = weight.tensor_type, weight.tensor_shape, []
    return module.get_weight(bare, torch.float32)


def stored_parts(weight: Tensor) -> list[Tensor]:
    """The tensors that a weight lies in memory as: of packed formats the packed numbers and their scales."""
    if is_gguf(weight):
        return [weight.as_subclass(Tensor)]
    if not isinstance(weight, QuantizedTensor):
        return [weight]
    values = (getattr(weight.params, field.name) for field in fields(weight.params))
    return [weight._qdata, *(value for value in values if isinstance(value, Tensor))]


def with_parts(weight: Any, each: Callable[[Tensor], Tensor]) -> QuantizedTensor:
    """A weight of ComfyUI's formats made of `each` of its tensors: the packed numbers and their scales."""
    values = {field.name: getattr(weight.params, field.name) for field in fields(weight.params)}
    params = replace(weight.params, **{name: each(v) for name, v in values.items() if isinstance(v, Tensor)})
    with torch.inference_mode(False):
        return QuantizedTensor(each(weight._qdata), weight._layout_cls, params)
