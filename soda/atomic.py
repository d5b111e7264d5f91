"""Files that are whole at any moment: written beside their place, flushed to the disk, then renamed into it.

A writer that is killed leaves the old file or the new one, and at most its own temporary file, which the next
writer in that folder removes once it is too old to be still written to.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from .errors import SodaFileError

PART = ".soda-part"
STALE_SECONDS = 600.0  # since the last byte was written


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replace `path` by what `write(temporary)` puts into a temporary file of the same folder.

    Raises SodaFileError if the folder cannot be written to; then, as after any other error, the old file stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:100]}.", suffix=PART)
        os.close(handle)
    except OSError as error:
        raise SodaFileError(
            f"{path}: the file cannot be written ({error.strerror or error}); check the folder"
        ) from error
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, (OSError, SafetensorError)):  # the latter is how safetensors reports a full disk
            remedy = "this is a folder, name a file in it" if path.is_dir() else "check the free space"
            said = getattr(error, "strerror", None) or error
            raise SodaFileError(f"{path}: the file cannot be written ({said}); {remedy}") from error
        raise


def _sweep(folder: Path) -> None:
    """Remove what killed writers left."""
    for part in folder.glob(f".*{PART}"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                part.unlink()
