"""A folder of bases, one file each, bounded in bytes, shared by any number of processes.

A file appears whole, by renaming, and may vanish at any time; nothing is ever locked. It holds a checksum and then the
tensors of `kept_form`, one after the other: the key says all else. A file that cannot be read, is longer or shorter, or
whose numbers do not add up is as good as none. What cannot be written is not kept: the log says so once, and the work
goes on.

Files are mapped, as ComfyUI maps a checkpoint: to read one into memory of its own takes several times as long, for most
of that is finding pages. Whoever shortens a file that is in use ends the process; nothing here does.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .decomposition import Basis, Key, kept_bytes, kept_form

Wanted = tuple[Key, tuple[int, ...]]  # of a weight: key and shape
Told = tuple[tuple[int, ...], Callable[[], None]]  # a shape and what to call
SUFFIX = ".basis"
CHECKSUM = 8  # bytes
WRITERS = 4
QUIET = 5.0  # seconds without another basis to write before the first is: until then somebody waits for an image
LATEST = 30.0  # seconds after which one is written even so
AHEAD = 16  # files
SLOW = 1 << 30  # bytes a second
ABANDONED = 3600.0  # seconds after which an unfinished file is taken for a killed writer's
log = logging.getLogger(__name__)


class BasisFolder:
    """At most `limit` bytes of bases in `path`, which is made on the first write; the files longest unused go first.

    Threads may read and write at once.
    """

    def __init__(self, path: str | os.PathLike, limit: int):
        self.path = Path(path)
        self.limit = limit
        self._unscanned = 0  # bytes that may be written before the folder is looked through again
        self._writable = True
        self._lock = threading.Lock()
        self._writers = ThreadPoolExecutor(WRITERS)
        self._later: deque[tuple[int, Future[None]]] = deque()
        self._left = 0  # bytes of those
        self._waiting: dict[Key, tuple[Basis, list[Told]]] = {}  # and who is told when it is written
        self._queueing = threading.Lock()
        self._queued = 0.0  # when the last one was
        self._hurry = threading.Event()

    def bound(self, limit: int) -> None:
        """Another limit from now on; what is beyond it goes at once."""
        self.limit = limit  # for what waits too
        self.flush()
        self._unscanned = 0
        self._writable = True
        with contextlib.suppress(OSError):
            self._make_room(0)

    def each(self, wanted: Sequence[Wanted]) -> Iterator[Basis | None]:
        """`get` of some weights in turn. Once one has come from the disk and not from the system's memory, the system
        reads the next ones while one is looked through."""
        for index, (key, shape) in enumerate(wanted):
            start = time.monotonic()
            basis = self.get(key, shape)
            if basis is not None and basis.nbytes < SLOW * (time.monotonic() - start):
                for following, _ in wanted[index + 1 : index + 1 + AHEAD]:
                    self._expect(following)
            yield basis

    def _expect(self, key: Key) -> None:
        """Have the system read a file: pages that several threads ask for would come one by one."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), open(self._file(key), "rb", buffering=0) as stored:
                os.posix_fadvise(stored.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def get(self, key: Key, shape: tuple[int, ...]) -> Basis | None:
        """The basis of a weight of this shape, perhaps one that is still to be written, or None."""
        with self._lock:
            if key in self._waiting:
                return self._waiting[key][0]
        file = self._file(key)
        try:
            basis = _read(file, key, shape)
            with contextlib.suppress(OSError):  # a folder that is read only keeps its times
                os.utime(file)
        except OSError:
            return None
        return basis

    def _holds(self, key: Key, shape: tuple[int, ...]) -> bool:
        """Whether there is such a file, whatever is in it."""
        try:
            return self._file(key).stat().st_size == CHECKSUM + kept_bytes(shape, key[1])
        except OSError:
            return False

    def put(self, key: Key, basis: Basis) -> None:
        """Write the basis, unless there is no room or no right to."""
        if not self._room_for(basis):
            return
        size = CHECKSUM + basis.nbytes
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self._lock:
                if size > self._unscanned:
                    self._make_room(size)
                self._unscanned -= size
            _write(self._file(key), key, basis)
        except OSError as error:
            with self._lock:
                told, self._writable = not self._writable, False
            if not told:
                log.warning("The folder %s cannot keep bases (%s); they are computed anew next time", self.path, error)

    def _room_for(self, basis: Basis) -> bool:
        """Whether there may be, once others are gone."""
        return self._writable and CHECKSUM + basis.nbytes <= self.limit

    def put_later(self, key: Key, basis: Basis, room: int) -> None:
        """`put` while the caller goes on, once it has no more of them or three quarters of `room` are taken; nothing
        where that would leave more than `room` bytes to write: to compute a basis again is better than to wait for a
        slow disk. A process that ends writes what is left first."""
        with self._queueing:
            while self._later and self._later[0][1].done():
                self._written()
            if self._left + basis.nbytes > room or not self._room_for(basis):
                return
            self._queued = time.monotonic()
            with self._lock:
                self._waiting.setdefault(key, (basis, []))
            self._later.append((basis.nbytes, self._writers.submit(self._put_when_quiet, self._queued, key, basis)))
            self._left += basis.nbytes
            (self._hurry.set if self._left > room * 3 // 4 else self._hurry.clear)()

    def _put_when_quiet(self, queued: float, key: Key, basis: Basis) -> None:
        while (left := min(self._queued + QUIET, queued + LATEST) - time.monotonic()) > 0:
            if self._hurry.wait(left):
                break
        try:
            self.put(key, basis)
        finally:
            with self._lock:
                _, told = self._waiting.pop(key, (basis, []))
        for shape, then in told:
            self.when_held(key, shape, then)

    def when_held(self, key: Key, shape: tuple[int, ...], then: Callable[[], None]) -> None:
        """Call `then` once there is a file of the basis: now, or from another thread, or never."""
        with self._lock:
            if key in self._waiting:
                self._waiting[key][1].append((shape, then))
                return
        if self._holds(key, shape):
            then()

    def flush(self) -> None:
        """Write all at once, and wait for it."""
        with self._queueing:
            self._hurry.set()
            try:
                while self._later:
                    self._written()
            finally:
                self._hurry.clear()

    def _written(self) -> None:
        size, future = self._later.popleft()
        self._left -= size
        future.result()

    def _file(self, key: Key) -> Path:
        return self.path / f"{key[0]}.{key[1]}{SUFFIX}"

    def _make_room(self, needed: int) -> None:
        """Remove the oldest files until `needed` bytes fit, and an eighth of the limit besides.

        Half of what is free then may be written before the next look, so that two writers together keep the limit.
        """
        files = sorted(self._entries())
        size = sum(bytes_ for _, bytes_, _ in files)
        if size + needed > self.limit:
            for _, bytes_, file in files:
                if size + needed <= self.limit - self.limit // 8:
                    break
                with contextlib.suppress(OSError):  # gone already, or open in another process on Windows
                    file.unlink()
                    size -= bytes_
        self._unscanned = max(needed, (self.limit - size) // 2)

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of every basis; on the way, unfinished files long forgotten are removed."""
        for file in self.path.iterdir():
            with contextlib.suppress(OSError):
                if file.name.endswith(SUFFIX):
                    stat = file.stat()
                    yield stat.st_mtime, stat.st_size, file
                elif file.name.endswith(f"{SUFFIX}.part") and time.time() - file.stat().st_mtime > ABANDONED:
                    file.unlink()


@torch.inference_mode(False)
def _read(file: Path, key: Key, shape: tuple[int, ...]) -> Basis:
    """Its tensors are the file's, or, where that cannot be mapped, of what was read from it; what is written to them
    stays in memory.

    Raises OSError where the file is longer or shorter, or was changed.
    """
    form = kept_form(shape, key[1])
    size = CHECKSUM + kept_bytes(shape, key[1])
    if file.stat().st_size != size:
        raise OSError(f"{file} has not the size of a basis of {tuple(shape)}")
    try:
        stored = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    except RuntimeError:  # a network's, perhaps
        stored = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
    data = stored[CHECKSUM:]
    if stored[:CHECKSUM].numpy().tobytes() != _checksum(key, data, int(_words(data).sum())):
        raise OSError(f"{file} was changed")
    pieces = data.split([math.prod(part) * dtype.itemsize for part, dtype in form.values()])
    tensors = {name: piece.view(form[name][1]).view(form[name][0]) for name, piece in zip(form, pieces, strict=True)}
    return replace(Basis.of(key[1], tensors), mapped=True)


def _write(file: Path, key: Key, basis: Basis) -> None:
    """By the thread that calls, while others run. Without fsync: after a power cut the checksum tells."""
    numbers = np.concatenate([tensor.reshape(-1).view(torch.uint8).numpy() for tensor in basis.tensors().values()])
    data = torch.from_numpy(numbers)
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=f"{SUFFIX}.part")
    try:
        with os.fdopen(handle, "wb") as stored:
            stored.write(_checksum(key, data, int(_words(data).numpy().sum())))
            stored.write(numbers.data)
        os.replace(temporary, file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if not (isinstance(error, PermissionError) and file.exists()):  # Windows keeps a file that another process uses
            raise


def _words(data: Tensor) -> Tensor:
    """As integers of 64 bits, without the last bytes if they make none."""
    return data[: len(data) // 8 * 8].view(torch.int64)


def _checksum(key: Key, data: Tensor, total: int) -> bytes:
    """The sum modulo 2^64 of `_words`, which is `total`, of the last bytes alone, and of a number of the key's own, so
    that a file of zeros is none. Any bit flipped and any page lost changes it. A pass at memory speed."""
    total += int(data[len(data) // 8 * 8 :].sum()) if len(data) % 8 else 0
    total += int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:CHECKSUM], "little")
    return (total % (1 << 8 * CHECKSUM)).to_bytes(CHECKSUM, "little")
