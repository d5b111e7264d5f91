"""Operators on the Lie coordinates t = (delta, triangles of A_j): any rule there keeps R orthogonal.

    lie_sum                                                    t = sum w_i t_i
    ties      e = sign(sum w_i t_i)                            t = sum of the w_i t_i whose sign is e
    dare      m_i ~ Bernoulli(density)                         t = sum w_i m_i t_i / density

ties first trims each t_i: per tensor, the ceil(density * count) numbers of largest size stay. It adds what agrees
where Yadav et al. (arXiv 2306.01708) take a mean and scale it, so that a weight means what it means elsewhere. dare
(Yu et al., arXiv 2311.03099) is lie_sum on average over seeds. After either, D is no sum of the parts' D: no sketch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy
import torch
from torch import Tensor

from ..adapter import Layer
from ..errors import SodaMixError
from .terms import Term, TermsByLayer, combine, common_turn, each_factor, weighted_sum


def lie_sum(layers: TermsByLayer) -> dict[str, tuple[Layer, ...]]:
    """Adapters of any form, exactly."""
    return {name: combine(name, terms, weighted_sum, each_factor(weighted_sum)) for name, terms in layers.items()}


def ties(layers: TermsByLayer, *, density: float = 0.5) -> dict[str, tuple[Layer, ...]]:
    """Raises SodaMixError for unlike factor sizes, whose coordinates have no signs in common."""
    _check(density)
    mixed = {}
    for name, terms in layers.items():
        common_turn(name, terms, "ties")
        trimmed = [term._replace(layer=_each(term.layer, partial(trim, density=density))) for term in terms]
        mixed[name] = combine(name, trimmed, elected_sum, each_factor(elected_sum))
    return mixed


def dare(layers: TermsByLayer, *, density: float = 0.5, seed: int = 0) -> dict[str, tuple[Layer, ...]]:
    """What is dropped follows from the seed, the adapter's content and the layer's name: not from the other adapters
    and not from the platform. Two copies of an adapter drop alike."""
    _check(density)
    dropped: dict[str, list[Term]] = {}
    for name, terms in layers.items():
        for term in terms:
            key = f"{seed}\0{term.source}\0{name}\0{term.layer.decomposition}\0{term.layer.sizes}"
            random = numpy.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little"))
            layer = _each(term.layer, partial(drop, density=density, random=random))
            dropped.setdefault(name, []).append(term._replace(layer=layer))
    return lie_sum(dropped)


def trim(t: Tensor, density: float) -> Tensor:
    """t `(n,)` with all but its ceil(density n) largest numbers 0; numbers as large as the least of these stay too."""
    if not t.numel():
        return t
    size = t.abs()
    least = size.topk(math.ceil(density * len(t))).values[-1]
    return torch.where(size >= least, t, 0.0)


def elected_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum of the w_i t_i that have the sign of sum w_i t_i, number by number."""
    elected = weighted_sum(tensors, weights).sign()
    agreeing = [torch.where((t * w).sign() == elected, t, 0.0) for t, w in zip(tensors, weights, strict=True)]
    return weighted_sum(agreeing, weights)


def drop(t: Tensor, density: float, random: numpy.random.Philox) -> Tensor:
    """t with each number kept with probability `density` and divided by it, else 0."""
    # 53 bits of the raw stream, which numpy keeps the same over versions
    uniform = torch.from_numpy((random.random_raw(t.numel()) >> numpy.uint64(11)) * 2.0**-53)
    return torch.where(uniform < density, t / density, 0.0)


def _each(layer: Layer, change: Callable[[Tensor], Tensor]) -> Layer:
    delta = None if layer.delta is None else change(layer.delta)
    return replace(layer, delta=delta, logs=tuple(map(change, layer.logs)), sketch=None)


def _check(density: float) -> None:
    if not 0 < density <= 1:
        raise SodaMixError(f"density is {density}, the share of numbers that stays; give more than 0 and at most 1")
