"""The weighted sum of adapters of one form, in one pass over all of their numbers.

The same arithmetic as layer by layer, number by number, so the same to the last bit; for SDXL and 8 adapters most of
the time goes into starting thousands of small sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeGuard

from torch import Tensor

from ..adapter import Adapter, Layer
from .terms import Part


def alike(parts: Sequence[Part]) -> TypeGuard[Sequence[tuple[Adapter, float]]]:
    """Whether these are some adapters of one form, one term in each layer, each once and with one weight for all of
    its layers."""
    return (
        all(isinstance(weight, int | float) and adapter.is_single_form()[0] for adapter, weight in parts)
        and len({adapter.content_hash for adapter, _ in parts}) == len(parts)
        and len({adapter.form for adapter, _ in parts}) == 1
    )


def summed(parts: Sequence[tuple[Adapter, float]]) -> dict[str, tuple[Layer, ...]]:
    """sum w_i t_i of adapters that are `alike`, in fp64, in the order of their hashes."""
    (first, weight), *others = sorted(parts, key=lambda part: part[0].content_hash)
    total = first.numbers.double().mul_(weight)
    part = total.clone() if others else total
    for adapter, weight in others:
        total.add_(part.copy_(adapter.numbers).mul_(weight))
    ordered = {name: first.layers[name][0] for name in sorted(first.layers)}
    following = iter(total.float().split([t.numel() for layer in ordered.values() for t in layer.tensors]))
    return {name: (_filled(layer, following),) for name, layer in ordered.items()}


def _filled(layer: Layer, following: Iterator[Tensor]) -> Layer:
    """A layer of this form with the numbers that follow."""
    delta = None if layer.delta is None else next(following)
    logs = tuple(next(following) for _ in layer.logs)
    sketch = None if layer.sketch is None else next(following).view(layer.sketch.shape)
    return Layer(layer.decomposition, delta, logs, sketch)
