"""Errors that a user can act on: each message names the thing, the value and the remedy."""

from __future__ import annotations

from pathlib import Path


class SodaError(ValueError):
    """Any error of this library."""


class SodaFileError(SodaError):
    """A file is not a readable SODA adapter, or an adapter cannot be written as one."""


class SodaMixError(SodaError):
    """Adapters do not fit together, or do not fit the weights they are applied to."""


class SodaTrainingError(SodaError):
    """A training run cannot start or go on."""


def unreadable(path: Path, error: OSError, wanted: str) -> SodaFileError:
    """Why a file cannot be opened, and what to do; `wanted` says what should be there."""
    if isinstance(error, FileNotFoundError):
        reason = f"there is no such file; choose {wanted}"
    elif path.is_dir():
        reason = f"this is a folder; choose {wanted}"
    else:
        reason = f"the file cannot be read ({error.strerror or error}); check its permissions, or choose {wanted}"
    return SodaFileError(f"{path}: {reason}")
