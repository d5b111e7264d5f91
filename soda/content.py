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
import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .fingerprint import random_words
from .precision import CPU

PIECE = 1024  # words
THREADS = min(16, os.cpu_count() or 1)
AT_ONCE = 1 << 22  # words on a GPU, where their products take 8 bytes each
SAMPLE = 1024
GOLDEN = (5**0.5 - 1) / 2


def weight_hash(weight: Tensor) -> str:
    """hash(W); the same numbers in another dtype have another."""
    return _digest(_kind(weight), [_sums(some).to(CPU).numpy() for some in _pieces(weight)])


def weight_hashes(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """`weight_hash` of each, all at one look at a device, in main memory by several threads, which leave as much as
    they can to the caller's: each look at a tensor would have them wait for one another. `weights` may load a weight
    anew at every look; no more are held than there are threads.
    """
    found: dict[str, str] = dict.fromkeys(weights, "")
    elsewhere: dict[torch.device, dict[str, tuple[bytes, Tensor]]] = {}
    coming: deque[tuple[str, Future[str]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for name, weight in weights.items():
            kind, pieces = _kind(weight), _pieces(weight)
            if weight.device != CPU:
                sums = torch.cat([_sums(some) for some in pieces])
                elsewhere.setdefault(sums.device, {})[name] = kind, sums
                continue
            coming.append((name, pool.submit(_near_hash, kind, [some.numpy() for some in pieces])))
            if len(coming) == THREADS:
                first, future = coming.popleft()
                found[first] = future.result()
        found.update((name, future.result()) for name, future in coming)
    for there in elsewhere.values():
        together = torch.cat([sums for _, sums in there.values()]).to(CPU)
        apart = together.split([len(sums) for _, sums in there.values()])
        for (name, (kind, _)), sums in zip(there.items(), apart, strict=True):
            found[name] = _digest(kind, [sums.numpy()])
    return found


def _near_hash(kind: bytes, pieces: Sequence[np.ndarray]) -> str:
    return _digest(kind, [_near_sums(some) for some in pieces])


def _digest(kind: bytes, sums: Sequence[np.ndarray]) -> str:
    return hashlib.sha256(kind + b"".join(some.tobytes() for some in sums)).hexdigest()


def _pieces(weight: Tensor) -> list[Tensor]:
    """All w `(n, 1024)` int32, those that are whole in the weight's own memory."""
    numbers = weight.detach().reshape(-1).view(torch.uint8)
    if numbers.storage_offset() % 4:  # rows of a fused weight
        numbers = numbers.clone()
    over = len(numbers) % (4 * PIECE)
    pieces = [numbers[: len(numbers) - over]]
    if over:
        pieces.append(F.pad(numbers[len(numbers) - over :], (0, 4 * PIECE - over)))
    return [some.view(torch.int32).view(-1, PIECE) for some in pieces]


@torch.no_grad()
def _sums(pieces: Tensor) -> Tensor:
    """s `(n,)` int64 of w `(n, 1024)`, where they lie."""
    if pieces.is_cuda:
        factors = _factors(pieces.device)
        return torch.cat([(some * factors).sum(-1) for some in pieces.split(AT_ONCE // PIECE)])
    return torch.from_numpy(_near_sums(pieces.to(CPU).numpy()))


def _near_sums(pieces: np.ndarray) -> np.ndarray:
    """The same in main memory; others run meanwhile."""
    return np.einsum("ij,j->i", pieces, _factors(CPU).numpy())


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
