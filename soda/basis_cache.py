"""Bases kept by what was decomposed, the content of a weight: in memory, and in a folder if one is given.

Looking at a weight costs a sample of its numbers while it is known, and a pass over all of them when it is new
(`content`).

SDXL's lq, 1.9 GB, takes an H100 2 s to decompose and a CPU minutes, its svd, 3.6 GB, an H100 8 s. What the folder has
of them is mapped: it takes memory as the system has it to spare, until it is pinned.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .adapter import Decomposition
from .bases import WORKING_SET, Progress, Some, decompose_batches, to_keep
from .basis_folder import BasisFolder, Wanted
from .content import samples, weight_hashes
from .decomposition import STREAMS, Basis, Key, stream_beside
from .precision import CPU

MEMORY_BYTES = 6 << 30  # SDXL's 560 matrices take 1.9 GB in lq, 3.6 GB in svd
DISK_BYTES = 8 << 30


class BasisCache:
    """Bases by content, the least recently used going first: at most `memory` bytes in memory, `disk` in `folder`."""

    def __init__(self, memory: int = MEMORY_BYTES, folder: str | os.PathLike | None = None, disk: int = DISK_BYTES):
        self.memory = memory
        self.size = 0
        self._folder = None if folder is None else BasisFolder(folder, disk)
        self._kept: OrderedDict[Key, Basis] = OrderedDict()
        self._known: dict[tuple[int, str], tuple[weakref.ref, str, str]] = {}
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
    ) -> Iterator[tuple[str, Basis]]:
        """(name, basis) of every weight, as kept and on the CPU: those at hand first, then the others.

        `owner` is an object that lives as long as these names mean its weights, such as the model: it saves hashing
        weights again of which a sample has not changed. hashes: what `hashes` gave for them. shapes: theirs, where to
        look at a weight costs more.
        `progress(done, total)` is told after every matrix. The folder is written afterwards; see `flush`.
        """
        if decomposition == "none":
            return
        hashes = self.hashes(weights, owner) if hashes is None else hashes
        keys: dict[str, Key] = {name: (hashes[name], decomposition) for name in weights}
        tell: Progress = progress or (lambda done, total: None)
        done, missing = 0, dict.fromkeys(weights)
        shapes = {name: tuple(weights[name].shape) for name in weights} if shapes is None else shapes
        wanted = {name: (key, shapes[name]) for name, key in keys.items()}
        for name, basis in self._at_hand(wanted):
            del missing[name]
            done += 1
            tell(done, len(weights))
            yield name, basis
        for batch in _computed(Some(weights, missing), decomposition, device, working_set):
            for name, basis in batch.items():
                if self._folder is not None:
                    self._folder.put_later(keys[name], basis, room=max(self.memory, working_set))
            for name, basis in batch.items():
                self._keep(keys[name], basis)
                done += 1
                tell(done, len(weights))
                yield name, basis

    def _at_hand(self, wanted: Mapping[str, Wanted]) -> Iterator[tuple[str, Basis]]:
        """Those in memory, then those on disk, one after the other: threads take turns at mapping files."""
        absent = []
        for name, (key, _) in wanted.items():
            basis = self._in_memory(key)
            if basis is None:
                absent.append(name)
            else:
                yield name, basis
        if self._folder is None:
            return
        for name, basis in zip(absent, self._folder.each([wanted[name] for name in absent]), strict=True):
            if basis is not None:
                self._keep(wanted[name][0], basis)
                yield name, basis

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
            found.update(weight_hashes(Some(weights, new)))
        if owner is not None:
            for name in new:
                self._remember(owner, name, seen[name], found[name])
        return found

    def get(self, key: Key, shape: tuple[int, ...]) -> Basis | None:
        """The basis of a weight of this shape by its `weight_hash` and decomposition, or None."""
        basis = self._in_memory(key)
        if basis is None and self._folder is not None:
            basis = self._folder.get(key, shape)
            if basis is not None:
                self._keep(key, basis)
        return basis

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

    def leave_to_disk(self, key: Key, shape: tuple[int, ...], then: Callable[[], None]) -> None:
        """Let go of a basis in memory as soon as the folder has it, now or never perhaps, and call `then`."""

        def left() -> None:
            self.forget(key)
            then()

        if self._folder is not None:
            self._folder.when_held(key, shape, left)

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
) -> Iterator[dict[str, Basis]]:
    """Bases as kept of one batch after the other; each comes to main memory while the next is computed."""

    def keep(batch: dict[str, Basis], made: torch.cuda.Event | None) -> dict[str, Basis]:
        beside = None
        if made is not None:
            beside = stream_beside(device, STREAMS)
            beside.wait_event(made)
        with torch.cuda.stream(beside):
            return {name: to_keep(basis) for name, basis in batch.items()}

    with ThreadPoolExecutor(1) as pool:
        coming: Future[dict[str, Basis]] | None = None
        for batch in decompose_batches(weights, decomposition, device=device, working_set=working_set):
            on_gpu = next(iter(batch.values())).spectrum.is_cuda
            made = torch.cuda.current_stream(device).record_event() if on_gpu else None
            before, coming = coming, pool.submit(keep, batch, made)
            if before is not None:
                yield before.result()
        if coming is not None:
            yield coming.result()
