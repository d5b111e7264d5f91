"""A folder of bases, one safetensors file each, bounded in bytes, shared by any number of processes.

A file appears whole, by renaming, and may vanish at any time; nothing is ever locked. A file that cannot be read,
whose numbers do not add up, or whose shapes are not those of the weight is as good as none. What cannot be written is
not kept: the log says so once, and the work goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from .decomposition import Basis, Key

SUFFIX = ".basis3.safetensors"  # 1 had all vectors in fp32, 2 no probes
WRITERS = 4
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
        self._queueing = threading.Lock()

    def bound(self, limit: int) -> None:
        """Another limit from now on; what is beyond it goes at once."""
        self.flush()
        self.limit = limit
        self._unscanned = 0
        self._writable = True
        with contextlib.suppress(OSError):
            self._make_room(0)

    def get(self, key: Key, shape: torch.Size) -> Basis | None:
        """The basis of a weight of this shape, or None."""
        file = self._file(key)
        try:
            with _mapped(file) as stored:
                tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
            with contextlib.suppress(OSError):  # a folder that is read only keeps its times
                os.utime(file)
            basis, checksum = Basis.of(key[1], tensors), tensors["checksum"]
        except (OSError, SafetensorError, ValueError, KeyError):
            return None
        return basis if basis.fits(shape) and torch.equal(checksum, _checksum(basis)) else None

    def put(self, key: Key, basis: Basis) -> None:
        """Write the basis, unless there is no room or no right to."""
        if not self._writable or basis.nbytes > self.limit:
            return
        data = to_bytes({**basis.tensors(), "checksum": _checksum(basis)})
        if len(data) > self.limit:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self._lock:
                if len(data) > self._unscanned:
                    self._make_room(len(data))
                self._unscanned -= len(data)
            _write(self._file(key), data)
        except OSError as error:
            with self._lock:
                told, self._writable = not self._writable, False
            if not told:
                log.warning("The folder %s cannot keep bases (%s); they are computed anew next time", self.path, error)

    def put_later(self, key: Key, basis: Basis, room: int) -> None:
        """`put` while the caller goes on, who waits where more than `room` bytes would be left to write.

        A process that ends writes what is left first.
        """
        with self._queueing:
            while self._later and (self._later[0][1].done() or self._left + basis.nbytes > room):
                self._written()
            self._later.append((basis.nbytes, self._writers.submit(self.put, key, basis)))
            self._left += basis.nbytes

    def flush(self) -> None:
        """Wait until all is written."""
        with self._queueing:
            while self._later:
                self._written()

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


def _mapped(file: Path) -> safe_open:
    """The file opened, mapped by torch, so that one copy is all. Raises OSError or SafetensorError."""
    try:
        return safe_open(file, "pt")
    except RuntimeError as error:  # torch's own, of a file that went between two looks at it
        raise OSError(f"{file}: {error}") from error


def _write(file: Path, data: bytes) -> None:
    """Without fsync: after a power cut the checksum tells."""
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=f"{SUFFIX}.part")
    try:
        with os.fdopen(handle, "wb") as part:
            part.write(data)
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _checksum(basis: Basis) -> Tensor:
    """The sums of the numbers' bits as 64-bit words modulo 2^64, the last bytes alone: any bit flipped, and any page
    lost, changes one. A pass at memory speed."""
    sums = []
    for _, tensor in sorted(basis.tensors().items()):
        bits = tensor.contiguous().reshape(-1).view(torch.uint8)
        words = bits.numel() // 8 * 8
        sums += [bits[:words].view(torch.int64).sum(), bits[words:].sum(dtype=torch.int64)]
    return torch.stack(sums)
