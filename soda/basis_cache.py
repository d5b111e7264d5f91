"""Bases kept by what was decomposed, the content of a weight: in memory, and in a folder if one is given.

Looking at a weight costs a sample of its numbers while it is known, and one SHA-256 when it is new: 1.9 GB for SDXL in
fp16, at some 1.5 GB/s a thread.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .adapter import Decomposition
from .bases import WORKING_SET, Progress, decompose_all
from .basis_folder import BasisFolder
from .decomposition import Basis, Key
from .precision import CPU

MEMORY_BYTES = 6 << 30  # SDXL's 560 matrices in one decomposition take 3.8 GB
DISK_BYTES = 16 << 30
HASH_THREADS = 4  # hashlib lets other threads run


class BasisCache:
    """Bases by content, the least recently used going first: at most `memory` bytes in memory, `disk` in `folder`."""

    def __init__(self, memory: int = MEMORY_BYTES, folder: str | os.PathLike | None = None, disk: int = DISK_BYTES):
        self.memory = memory
        self.size = 0
        self._folder = None if folder is None else BasisFolder(folder, disk)
        self._kept: OrderedDict[Key, Basis] = OrderedDict()
        self._known: dict[tuple[int, str], tuple[weakref.ref, str, str]] = {}
        self._lock = threading.Lock()

    def bases(
        self,
        weights: Mapping[str, Tensor],
        decomposition: Decomposition,
        *,
        owner: object = None,
        device: torch.device = CPU,
        working_set: int = WORKING_SET,
        progress: Progress | None = None,
    ) -> Iterator[tuple[str, Basis]]:
        """(name, basis) of every weight, fp32 on the CPU: those at hand first, the others by `decompose_all`.

        `owner` is an object that lives as long as these names mean its weights, such as the model: it saves hashing
        weights again of which a sample has not changed. `progress(done, total)` is told after every matrix.
        """
        if decomposition == "none":
            return
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            hashes = list(pool.map(lambda item: self._hash(owner, *item), weights.items()))
        keys: dict[str, Key] = {name: (found, decomposition) for name, found in zip(weights, hashes, strict=True)}
        tell: Progress = progress or (lambda done, total: None)
        missing: dict[str, Tensor] = {}
        known = 0
        for name, weight in weights.items():
            basis = self.get(keys[name], weight.shape)
            if basis is None:
                missing[name] = weight
            else:
                known += 1
                tell(known, len(weights))
                yield name, basis
        for name, basis in decompose_all(
            missing, decomposition, device=device, working_set=working_set,
            progress=lambda done, _: tell(known + done, len(weights)),
        ):  # fmt: skip
            self.put(keys[name], basis)
            yield name, basis

    def get(self, key: Key, shape: torch.Size) -> Basis | None:
        """The basis of a weight of this shape by its `weight_hash` and decomposition, or None."""
        with self._lock:
            basis = self._kept.get(key)
            if basis is not None:
                self._kept.move_to_end(key)
                return basis
        basis = None if self._folder is None else self._folder.get(key, shape)
        if basis is not None:
            self._keep(key, basis)
        return basis

    def put(self, key: Key, basis: Basis) -> None:
        """Keep a basis, in memory and in the folder."""
        self._keep(key, basis)
        if self._folder is not None:
            self._folder.put(key, basis)

    def _keep(self, key: Key, basis: Basis) -> None:
        with self._lock:
            self._drop(key)
            self._kept[key] = basis
            self.size += basis.nbytes
            while self.size > self.memory:
                self._drop(next(iter(self._kept)))

    def _drop(self, key: Key) -> None:
        basis = self._kept.pop(key, None)
        if basis is not None:
            self.size -= basis.nbytes

    def _hash(self, owner: object, name: str, weight: Tensor) -> str:
        if owner is None:
            return weight_hash(weight)
        place, seen = (id(owner), name), sample(weight)
        known = self._known.get(place)
        if known is not None and known[0]() is owner and known[1] == seen:
            return known[2]
        digest = weight_hash(weight)
        self._known[place] = (weakref.ref(owner, lambda _: self._known.pop(place, None)), seen, digest)
        return digest


def weight_hash(weight: Tensor) -> str:
    """SHA-256 over dtype, shape and the numbers as they are stored.

    Half the bytes of `fingerprint.tensor_hash` for a 16 bit weight; the same numbers in fp32 are another key.
    """
    return _digest(weight, weight)


def sample(weight: Tensor) -> str:
    """A digest of dtype, shape and some thousand evenly spaced numbers: tells a changed weight from the same one."""
    flat = weight.reshape(-1)
    return _digest(weight, flat[:: max(1, flat.numel() // 1024)])


def _digest(weight: Tensor, numbers: Tensor) -> str:
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    digest.update(numbers.detach().to(CPU).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
