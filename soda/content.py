"""Weights told apart by their content: all of it, or a sample.

    hash(W) = SHA-256(dtype, shape, s_1 .. s_n)        s_i = sum_j a_j w_ij  mod 2^64

w_i: the i-th 4 KiB of the numbers as they are stored, as 1024 integers of 32 bits, zeros after the last; a: fixed
random integers of 64 bits. Two pieces that differ by w and w' have the same s by chance, 2^-33 or less (multilinear
hashing: Carter and Wegman 1979; modulo a power of two: Dietzfelbinger 1996). That is for what may differ by accident;
whoever wants two weights to look alike can make them so. Files name their base by `fingerprint.tensor_hash`, which
nobody can forge.

The sums are a pass at memory speed where the weight lies, and a 512th of it is all that leaves a GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .fingerprint import random_words
from .precision import CPU

PIECE = 1024  # words
AT_ONCE = 1 << 22  # words on a GPU, where their products take 8 bytes each
SAMPLE = 1024
GOLDEN = (5**0.5 - 1) / 2


def weight_hash(weight: Tensor) -> str:
    """hash(W); the same numbers in another dtype have another."""
    return weight_hashes({"": weight})[""]


def weight_hashes(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """`weight_hash` of each, all at one look at a device; `weights` may load a weight anew at every look."""
    if not weights:
        return {}
    kinds, sums = [], []
    for weight in weights.values():
        kinds.append(_kind(weight))
        sums.append(_sums(weight.detach()))
    lengths = [len(one) for one in sums]
    if len({one.device for one in sums}) > 1:
        sums = [one.to(CPU) for one in sums]
    hashed = zip(weights, kinds, torch.cat(sums).to(CPU).split(lengths), strict=True)
    return {name: hashlib.sha256(kind + one.numpy().tobytes()).hexdigest() for name, kind, one in hashed}


@torch.no_grad()
def _sums(weight: Tensor) -> Tensor:
    """s `(n,)` int64, where the weight lies."""
    numbers = weight.reshape(-1).view(torch.uint8)
    if numbers.storage_offset() % 4:  # rows of a fused weight
        numbers = numbers.clone()
    over = len(numbers) % (4 * PIECE)
    whole = _piece_sums(numbers[: len(numbers) - over].view(torch.int32).view(-1, PIECE))
    if not over:
        return whole
    rest = F.pad(numbers[len(numbers) - over :], (0, 4 * PIECE - over))
    return torch.cat([whole, _piece_sums(rest.view(torch.int32).view(1, PIECE))])


def _piece_sums(pieces: Tensor) -> Tensor:
    """Of w `(n, 1024)`."""
    if pieces.is_cuda:
        factors = _factors(pieces.device)
        return torch.cat([(some * factors).sum(-1) for some in pieces.split(AT_ONCE // PIECE)])
    return torch.from_numpy(np.einsum("ij,j->i", pieces.to(CPU).numpy(), _factors(CPU).numpy()))  # others run meanwhile


@lru_cache(maxsize=8)
def _factors(device: torch.device) -> Tensor:
    """a `(1024,)`."""
    with torch.inference_mode(False):
        return random_words(PIECE, seed=3).to(device)


def samples(weights: Sequence[Tensor]) -> list[str]:
    """For each a digest of dtype, shape and some thousand spread numbers: tells a changed weight from the same one.

    One look at a device, not one for each. In main memory by one thread: those that help wait at work for more.
    """
    alike: dict[tuple, list[int]] = {}
    for index, weight in enumerate(weights):
        alike.setdefault((weight.dtype, weight.device, min(weight.numel(), SAMPLE)), []).append(index)
    digests = [""] * len(weights)
    for (_, device, _), members in alike.items():
        spread = [_spread(weights[index].detach()) for index in members]
        if device != CPU:
            spread = list(torch.stack(spread).to(CPU))
        for index, numbers in zip(members, spread, strict=True):
            digests[index] = hashlib.sha256(_kind(weights[index]) + numbers.numpy().tobytes()).hexdigest()
    return digests


def _spread(weight: Tensor) -> Tensor:
    """The bytes of a sample."""
    flat, count = weight.reshape(-1), weight.numel()
    if weight.element_size() == 1:
        flat = flat.view(torch.uint8)  # few operations know 8 bit floats
    return (flat.contiguous() if count <= SAMPLE else flat.index_select(0, _places(count, flat.device))).view(
        torch.uint8
    )


@lru_cache(maxsize=64)
def _places(count: int, device: torch.device) -> Tensor:
    """Indices below `count` in all rows and columns alike: a fixed step may meet few columns again and again."""
    with torch.inference_mode(False):
        return (torch.arange(SAMPLE, dtype=torch.float64) * GOLDEN % 1 * count).long().to(device)


def _kind(weight: Tensor) -> bytes:
    return f"{weight.dtype} {tuple(weight.shape)}".encode()
