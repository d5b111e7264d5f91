"""What trainings leave on disk, so that neither a crash nor a restart of ComfyUI costs one.

In user/soda/training, by the hash of a run's inputs:

    <hash>.run.safetensors         its last checkpoint, until it is finished
    <hash>.safetensors             the finished adapter, a SODA file
    <hash>.losses.json             the loss of its every step
    <hash>.last_good.safetensors   the adapter of a run that diverged, as of its last good step

The newest 20 runs of each kind are kept.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import folder_paths

from ...adapter import Adapter
from ...atomic import replace_file
from ...errors import SodaFileError
from ...file import load, save
from ...training import checkpoint

KEPT = 20
CHECKPOINT, FINISHED, LOSSES, LAST_GOOD = (
    ".run.safetensors", ".safetensors", ".losses.json", ".last_good.safetensors"
)  # fmt: skip


class KeptRun:
    """The files of the run whose inputs hash to `key`."""

    def __init__(self, key: str):
        self.key = key
        self.folder = Path(folder_paths.get_user_directory()) / "soda" / "training"

    def path(self, ending: str) -> Path:
        return self.folder / f"{self.key}{ending}"

    def finished(self) -> tuple[Adapter, list[float]] | None:
        """The finished adapter and the loss of every step; None where there is none, or it cannot be read."""
        try:
            adapter = load(self.path(FINISHED))
            losses = json.loads(self.path(LOSSES).read_text())
        except (SodaFileError, OSError, ValueError):
            return None
        for ending in (FINISHED, LOSSES):
            with contextlib.suppress(OSError):
                os.utime(self.path(ending))  # used, so not the next to go
        return adapter, [float(loss) for loss in losses]

    def finish(self, adapter: Adapter, losses: list[float]) -> None:
        """Raises SodaFileError where the folder cannot be written to."""
        replace_file(self.path(LOSSES), lambda file: file.write_text(json.dumps(losses)))
        save(adapter, self.path(FINISHED))
        self.drop_checkpoint()
        self._bound()

    def checkpoint(self) -> dict[str, Any] | None:
        """The state to go on from; None where there is none. Raises SodaFileError if it is damaged."""
        path = self.path(CHECKPOINT)
        return checkpoint.read(path) if path.exists() else None

    def keep(self, state: dict[str, Any]) -> None:
        """Raises SodaFileError where the folder cannot be written to."""
        checkpoint.write(self.path(CHECKPOINT), state)
        self._bound()

    def drop_checkpoint(self) -> None:
        """One that cannot be removed does no harm: it is of these very inputs."""
        with contextlib.suppress(OSError):
            self.path(CHECKPOINT).unlink()

    def keep_last_good(self, adapter: Adapter) -> Path:
        """Raises SodaFileError where the folder cannot be written to."""
        save(adapter, self.path(LAST_GOOD))
        self._bound()
        return self.path(LAST_GOOD)

    def _bound(self) -> None:
        """Remove all but the newest files of each kind."""
        kinds: dict[str, list[Path]] = {}
        for path in self.folder.glob("[!.]*"):
            kinds.setdefault(path.name[path.name.index(".") :], []).append(path)
        for paths in kinds.values():
            dated = []
            for path in paths:
                with contextlib.suppress(OSError):
                    dated.append((path.stat().st_mtime_ns, path))
            for _, path in sorted(dated)[:-KEPT]:
                path.unlink(missing_ok=True)
