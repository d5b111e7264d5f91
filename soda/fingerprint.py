"""Is this the base that the adapter was trained on? A hash says yes or no, a sketch says how far off its effect is.

sketch(D) = S_1 D S_2^T / 8 with S_1 (8, out), S_2 (8, in) standard normal, so that its Frobenius norm estimates that
of D. It is linear in D: the norm of the difference of two sketches estimates the error of D on another base, and
the sketch of a mix is the mix of the sketches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

SKETCH_SIZE = 8
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of the shape and of the values as little-endian fp32: fp16 and its fp32 copy hash alike."""
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    numbers = tensor.detach().to("cpu").to(torch.float32).contiguous().numpy().astype("<f4", copy=False)
    digest.update(numbers.data)  # lets other threads run meanwhile
    return digest.hexdigest()


def base_hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, in order, and hashes of the weights that an adapter changes."""
    return joint_hash({name: tensor_hash(weight) for name, weight in weights.items()})


def joint_hash(hashes: Mapping[str, str]) -> str:
    """`base_hash` of weights from their `tensor_hash`es, for weights that are not in memory together."""
    digest = hashlib.sha256()
    for name in sorted(hashes):
        digest.update(f"{name}\0{hashes[name]}\0".encode())
    return digest.hexdigest()


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def random_words(count: int, seed: int) -> Tensor:
    """int64 by SplitMix64 on a counter: the same numbers on every platform and torch version."""
    x = (torch.arange(1, count + 1, dtype=torch.int64) + (seed << 40)) * _GOLDEN
    for bits, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64))):
        x = (x ^ _shift_right(x, bits)) * factor
    return x ^ _shift_right(x, 31)


def _uniform(count: int, seed: int) -> Tensor:
    """fp64 in (0, 1)."""
    return (_shift_right(random_words(count, seed), 11).double() + 0.5) / (1 << 53)


@lru_cache(maxsize=64)
def _gaussian(width: int, seed: int) -> Tensor:
    """The standard normal `(8, width)` fp64 of a seed, by Box and Muller."""
    count = SKETCH_SIZE * width
    uniform = _uniform(2 * count, seed)
    radius = torch.sqrt(-2 * torch.log(uniform[:count]))
    return (radius * torch.cos(2 * math.pi * uniform[count:])).reshape(SKETCH_SIZE, width)


def sketch(change: Tensor) -> Tensor:
    """The `(..., 8, 8)` fp32 sketch of D `(..., out, in)`, on the CPU."""
    d = change.detach().to("cpu", torch.float64)
    left, right = random_matrices(d.shape)
    return (left @ d @ right.mT / SKETCH_SIZE).float()


def random_matrices(shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """S_1 `(8, out)` and S_2 `(8, in)` for a D `(..., out, in)`, fp64 on the CPU; read only."""
    return _gaussian(shape[-2], 1), _gaussian(shape[-1], 2)


def relative_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    """Estimated ||D - D0|| / ||D0|| over all layers together, from pairs (sketch of D, sketch of D0).

    None without pairs or where all D0 are 0. One dense D is estimated to some +-10 %, one of rank 1 to +-40 %
    (1 standard deviation); errors of many layers average out.
    """
    wrong, whole = 0.0, 0.0
    for here, trained in pairs:
        wrong += (here.double() - trained.double()).square().sum().item()
        whole += trained.double().square().sum().item()
    return math.sqrt(wrong / whole) if whole > 0 else None
