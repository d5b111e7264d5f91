"""The user's cache folder: what is installed there once and used by every later run.

A thing in the cache counts as there only when its stamp, written last, is there: whatever was interrupted is removed
and made again. One lock keeps two runs from installing at once; the system releases it when its holder dies.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import RunError
from .terminal import Status

STAMP = "complete.txt"


def cache_folder() -> Path:
    """SODA_CACHE, or the place that the operating system means for caches; made when missing."""
    if os.environ.get("SODA_CACHE"):
        folder = Path(os.environ["SODA_CACHE"]).expanduser().absolute()
    elif os.name == "nt":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "comfyui-soda" / "cache"
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches" / "comfyui-soda"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comfyui-soda"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"Cannot make the cache folder {folder} ({error.strerror}): set SODA_CACHE.") from error
    return folder


def key(*parts: str) -> str:
    """A short name for a set of pins: another set, another folder."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]


def is_complete(folder: Path) -> bool:
    return (folder / STAMP).is_file()


@contextlib.contextmanager
def making(folder: Path, status: Status) -> Iterator[None]:
    """Fills `folder` from empty; the stamp is written only if the body succeeds, and a failure leaves nothing."""
    remove(folder)
    folder.mkdir(parents=True)
    try:
        yield
        (folder / STAMP).write_text("complete\n")
    except BaseException:
        status.done(f"Removing the unfinished {folder}")
        remove(folder)
        raise


def remove(folder: Path) -> None:
    """The stamp goes first, so that a removal that is cut short does not leave a folder that looks whole."""
    (folder / STAMP).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        raise RunError(f"Cannot remove the unfinished folder {folder}; close what uses it or delete it by hand.")


def require_space(folder: Path, gigabytes: float) -> None:
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        raise RunError(
            f"Too little disk space: installing needs about {gigabytes:g} GB in {folder}, and {free:.1f} GB are free; "
            "free some, or set SODA_CACHE to a folder on another disk."
        )


@contextlib.contextmanager
def lock(folder: Path, status: Status) -> Iterator[None]:
    """Only one process installs at a time; the others wait and say so."""
    try:
        handle = open(folder / "lock", "a+b")  # noqa: SIM115 (held for the whole body)
    except OSError as error:
        raise RunError(f"Cannot write to the cache folder {folder} ({error.strerror}): set SODA_CACHE.") from error
    with handle:
        started = time.monotonic()
        while not _try_lock(handle):
            status.update(f"Another run.py is installing into {folder}; waiting ({time.monotonic() - started:.0f} s)")
            time.sleep(0.5)
        yield


def _try_lock(handle) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
