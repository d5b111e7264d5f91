"""Bases kept by what was decomposed, the content of a weight: in memory, and in a folder if one is given.

Looking at a weight costs a sample of its numbers while it is known, and one SHA-256 when it is new: 1.9 GB for SDXL in
fp16, at some 1.5 GB/s a thread.

The folder keeps what takes longer to compute than to read, for which READ_RATE stands: what an SSD may give. SDXL's lq,
1.9 GB, takes an H100 2 s to decompose and a CPU minutes, its svd an H100 8 s.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from .adapter import Decomposition
from .bases import WORKING_SET, Progress, Some, decompose_batches, stream_after, to_keep
from .basis_folder import BasisFolder
from .decomposition import Basis, Key
from .precision import CPU

MEMORY_BYTES = 6 << 30  # SDXL's 560 matrices take 1.9 GB in lq, 3.6 GB in svd
DISK_BYTES = 8 << 30
READ_RATE = 2e9  # bytes of bases a second
THREADS = min(16, os.cpu_count() or 1)  # hashing and reading let other threads run
AT_ONCE = 4 * THREADS
READERS = 4  # behind a job that goes on; more would take turns with it
SAMPLE = 1024
STAGED = 4 << 20  # bytes
Wanted = tuple[Key, tuple[int, ...]]  # of a weight: key and shape
GOLDEN = (5**0.5 - 1) / 2


class BasisCache:
    """Bases by content, the least recently used going first: at most `memory` bytes in memory, `disk` in `folder`."""

    def __init__(self, memory: int = MEMORY_BYTES, folder: str | os.PathLike | None = None, disk: int = DISK_BYTES):
        self.memory = memory
        self.size = 0
        self._folder = None if folder is None else BasisFolder(folder, disk)
        self._kept: OrderedDict[Key, Basis] = OrderedDict()
        self._known: dict[tuple[int, str], tuple[weakref.ref, str, str]] = {}
        self._coming: dict[Key, Future[None]] = {}
        self._readers = ThreadPoolExecutor(READERS)
        self._lock = threading.Lock()

    def bound(self, memory: int, disk: int) -> None:
        """Other bounds from now on; what is beyond them goes at once, at 0 all."""
        with self._lock:
            self.memory = memory
            self._shrink()
        if self._folder is not None and self._folder.limit != disk:
            self._folder.bound(disk)

    def bases(
        self,
        weights: Mapping[str, Tensor],
        decomposition: Decomposition,
        *,
        owner: object = None,
        hashes: Mapping[str, str] | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        device: torch.device = CPU,
        working_set: int = WORKING_SET,
        progress: Progress | None = None,
        outlines: bool = False,
    ) -> Iterator[tuple[str, Basis]]:
        """(name, basis) of every weight, as kept and on the CPU: those at hand first, then the others.

        With `outlines` those on disk are given without their vectors, which `get` reads, and `read_ahead` earlier.

        `owner` is an object that lives as long as these names mean its weights, such as the model: it saves hashing
        weights again of which a sample has not changed. hashes: what `hashes` gave for them. shapes: theirs, where to
        look at a weight costs more.
        `progress(done, total)` is told after every matrix. The folder is written meanwhile and afterwards; see `flush`.
        """
        if decomposition == "none":
            return
        hashes = self.hashes(weights, owner) if hashes is None else hashes
        keys: dict[str, Key] = {name: (hashes[name], decomposition) for name in weights}
        tell: Progress = progress or (lambda done, total: None)
        done, missing = 0, dict.fromkeys(weights)
        shapes = {name: tuple(weights[name].shape) for name in weights} if shapes is None else shapes
        wanted = {name: (key, shapes[name]) for name, key in keys.items()}
        for name, basis in self._outlined(wanted) if outlines else self._at_hand(wanted):
            del missing[name]
            done += 1
            tell(done, len(weights))
            yield name, basis
        for batch, worth_reading in _computed(Some(weights, missing), decomposition, device, working_set):
            if self._folder is not None and worth_reading:
                for name, basis in batch.items():
                    self._folder.put_later(keys[name], basis, room=max(self.memory, working_set))
            for name, basis in batch.items():
                self._keep(keys[name], basis)
                done += 1
                tell(done, len(weights))
                yield name, basis

    def _at_hand(self, wanted: Mapping[str, Wanted]) -> Iterator[tuple[str, Basis]]:
        """Those in memory, then those on disk, some at a time: what is not kept must not pile up."""
        absent = yield from self._in_memory_of(wanted)
        if self._folder is None or not absent:
            return
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(absent), AT_ONCE):
                some = absent[start : start + AT_ONCE]
                for name, basis in zip(some, pool.map(lambda name: self.get(*wanted[name]), some), strict=True):
                    if basis is not None:
                        yield name, basis

    def _outlined(self, wanted: Mapping[str, Wanted]) -> Iterator[tuple[str, Basis]]:
        """Those in memory, then the outlines of those on disk."""
        absent = yield from self._in_memory_of(wanted)
        if self._folder is None:
            return
        for name in absent:
            outline = self._folder.outline(*wanted[name])
            if outline is not None:
                yield name, outline

    def _in_memory_of(self, wanted: Mapping[str, Wanted]) -> Generator[tuple[str, Basis], None, list[str]]:
        """Those in memory; returns the names of the others."""
        absent = []
        for name, (key, _) in wanted.items():
            basis = self._in_memory(key)
            if basis is None:
                absent.append(name)
            else:
                yield name, basis
        return absent

    def hashes(
        self, weights: Mapping[str, Tensor], owner: object = None, seen: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """`weight_hash` of every weight; see `bases` for the owner.

        seen: a digest of each weight that changes with it, where looking at the weight itself costs more.
        """
        if seen is None:
            seen = {} if owner is None else dict(zip(weights, samples(list(weights.values())), strict=True))
        known = {name: self._known.get((id(owner), name)) for name in seen}
        found = {n: k[2] for n, k in known.items() if k is not None and k[0]() is owner and k[1] == seen[n]}
        new = [name for name in weights if name not in found]
        if new:
            shares = [new[start::THREADS] for start in range(THREADS)]
            with ThreadPoolExecutor(THREADS) as pool:
                for hashed in pool.map(lambda names: [(name, weight_hash(weights[name])) for name in names], shares):
                    found.update(hashed)
        if owner is not None:
            for name in new:
                self._remember(owner, name, seen[name], found[name])
        return found

    def get(self, key: Key, shape: tuple[int, ...]) -> Basis | None:
        """The basis of a weight of this shape by its `weight_hash` and decomposition, or None."""
        with self._lock:
            coming = self._coming.get(key)
            waiting = coming is not None and coming.cancel()
            if waiting:  # behind others that nobody asks for yet
                del self._coming[key]
        if coming is not None and not waiting:
            coming.result()
        basis = self._in_memory(key)
        return basis if basis is not None or self._folder is None else self._read(key, shape)

    def _read(self, key: Key, shape: tuple[int, ...]) -> Basis | None:
        """From the folder into memory."""
        assert self._folder is not None
        basis = self._folder.get(key, shape)
        if basis is not None:
            self._keep(key, basis)
        return basis

    def read_ahead(self, wanted: Iterable[Wanted]) -> None:
        """Read these from the folder into memory while the caller goes on, the first ones first; `get` waits for what
        is being read. The caller and the readers take turns: worth it where it mostly waits for something else."""

        def read(key: Key, shape: tuple[int, ...]) -> None:
            try:
                self._read(key, shape)
            finally:
                with self._lock:
                    del self._coming[key]

        if self._folder is None:
            return
        with self._lock:
            for key, shape in wanted:
                if key not in self._coming and key not in self._kept:
                    self._coming[key] = self._readers.submit(read, key, shape)

    def _in_memory(self, key: Key) -> Basis | None:
        with self._lock:
            basis = self._kept.get(key)
            if basis is not None:
                self._kept.move_to_end(key)
            return basis

    def put(self, key: Key, basis: Basis, to_disk: bool = True) -> None:
        """Keep a basis that is in its kept form, in memory and in the folder."""
        self._keep(key, basis)
        if self._folder is not None and to_disk:
            self._folder.put(key, basis)

    def flush(self) -> None:
        """Wait until what was computed is on disk."""
        if self._folder is not None:
            self._folder.flush()

    def leave_to_disk(self, key: Key, shape: tuple[int, ...]) -> Basis | None:
        """Let go of a basis in memory; its outline, or None, and nothing done, where the folder has none."""
        outline = None if self._folder is None else self._folder.outline(key, shape)
        if outline is not None:
            self.forget(key)
        return outline

    def forget(self, key: Key) -> None:
        """Let go of a basis in memory."""
        with self._lock:
            self._drop(key)

    def _keep(self, key: Key, basis: Basis) -> None:
        with self._lock:
            self._drop(key)
            self._kept[key] = basis
            self.size += basis.nbytes
            self._shrink()

    def _shrink(self) -> None:
        while self.size > self.memory:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: Key) -> None:
        basis = self._kept.pop(key, None)
        if basis is not None:
            self.size -= basis.nbytes

    def _remember(self, owner: object, name: str, seen: str, digest: str) -> None:
        place = (id(owner), name)
        self._known[place] = (weakref.ref(owner, lambda _: self._known.pop(place, None)), seen, digest)


def _computed(
    weights: Mapping[str, Tensor], decomposition: Decomposition, device: torch.device, working_set: int
) -> Iterator[tuple[dict[str, Basis], bool]]:
    """(bases as kept, whether reading them takes less time than computing them) of one batch after the other; each
    comes to main memory while the next is computed."""

    def keep(batch: dict[str, Basis], taken: float, made: torch.cuda.Stream | None) -> tuple[dict[str, Basis], bool]:
        with torch.cuda.stream(made):
            kept = {name: to_keep(basis) for name, basis in batch.items()}
        return kept, taken * READ_RATE > sum(basis.nbytes for basis in kept.values())

    with ThreadPoolExecutor(1) as pool:
        coming: Future[tuple[dict[str, Basis], bool]] | None = None
        start = time.perf_counter()
        for batch in decompose_batches(weights, decomposition, device=device, working_set=working_set):
            made = stream_after(next(iter(batch.values())).spectrum.device)
            before, coming = coming, pool.submit(keep, batch, time.perf_counter() - start, made)
            if before is not None:
                yield before.result()
            start = time.perf_counter()
        if coming is not None:
            yield coming.result()


def weight_hash(weight: Tensor) -> str:
    """SHA-256 over dtype, shape and the numbers as they are stored.

    Half the bytes of `fingerprint.tensor_hash` for a 16 bit weight; the same numbers in fp32 are another key.
    """
    digest = hashlib.sha256(_kind(weight))
    numbers = weight.detach().reshape(-1).view(torch.uint8)
    if weight.is_cuda:  # through little memory that is pinned, for new pages take longer than the copy into them
        staged = _pinned(min(STAGED, len(numbers)))
        for piece in numbers.split(STAGED):
            digest.update(staged[: len(piece)].copy_(piece).numpy().data)
    else:
        digest.update(numbers.to(CPU).numpy().data)
    return digest.hexdigest()


def _pinned(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:  # where none can be had
        return torch.empty(size, dtype=torch.uint8)


def samples(weights: Sequence[Tensor]) -> list[str]:
    """For each a digest of dtype, shape and some thousand spread numbers: tells a changed weight from the same one.

    One look at a device, not one for each.
    """
    alike: dict[tuple, list[int]] = {}
    for index, weight in enumerate(weights):
        alike.setdefault((weight.dtype, weight.device, min(weight.numel(), SAMPLE)), []).append(index)
    digests = [""] * len(weights)
    for members in alike.values():
        spread = torch.stack([_spread(weights[index].detach()) for index in members]).to(CPU).numpy()
        for index, numbers in zip(members, spread, strict=True):
            digests[index] = hashlib.sha256(_kind(weights[index]) + numbers.tobytes()).hexdigest()
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
