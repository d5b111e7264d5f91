"""What LoRAs and other patches add to a weight, T (out, in), as the product t(x) = x T^T; without forming T."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy.weight_adapter import BypassForwardHook, WeightAdapterBase
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]


def added(entries: Sequence[tuple], module: Any, device: torch.device, dtype: torch.dtype) -> Product | None:
    """t of patches, as a patcher lists them, on the weight of a linear module; None if they add nothing.

    LoRA, LoHa, LoKr and plain differences count; what follows from the weight itself (OFT, a LoRA's DoRA scale) does
    not.
    """
    parts = []
    for strength, patch, _, offset, _ in entries:
        product = _product(module, patch, strength, device, dtype)
        if product is not None:
            parts.append((product, slice(None) if offset is None else slice(offset[1], offset[1] + offset[2])))
    if not parts:
        return None
    width = module.weight.shape[0]

    def total(x: Tensor) -> Tensor:
        y = x.new_zeros(*x.shape[:-1], width)
        for product, rows in parts:
            y[..., rows] += product(x)
        return y

    return total


def _product(module: Any, patch: Any, strength: float, device: torch.device, dtype: torch.dtype) -> Product | None:
    def near(value: Any) -> Any:
        return value.to(device=device, dtype=dtype) if isinstance(value, Tensor) else value

    if isinstance(patch, WeightAdapterBase):
        if type(patch).h is WeightAdapterBase.h:
            return None
        adapter = copy.copy(patch)
        adapter.weights = tuple(map(near, patch.weights))
        BypassForwardHook(module, adapter, strength)  # tells the copy its strength and the kind of its module

        def product(x: Tensor) -> Tensor:
            x = x.to(dtype)
            return adapter.h(x, x.new_zeros(*x.shape[:-1], module.weight.shape[0]))

        return product
    kind, values = patch if isinstance(patch, tuple) and len(patch) == 2 else ("diff", patch)
    if kind == "diff" and isinstance(values, tuple) and isinstance(values[0], Tensor) and values[0].dim() == 2:
        change = near(values[0]) * strength
        return lambda x: nn.functional.linear(x.to(dtype), change)
    return None
