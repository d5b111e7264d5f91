"""What the user set under Settings > SODA (web/settings.js), from where ComfyUI keeps it:
user/default/comfy.settings.json."""

from __future__ import annotations

import json
from pathlib import Path

import folder_paths

from ...basis_cache import DISK_BYTES, MEMORY_BYTES

MEMORY, DISK = "SODA.basesInMemory", "SODA.basesOnDisk"  # in GB, 0 for none


def basis_bounds() -> tuple[int, int]:
    """Bytes of bases to keep in memory and on disk."""
    try:
        chosen = json.loads((Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json").read_text())
    except (OSError, ValueError):  # nothing was ever set, or the page is writing it right now
        chosen = {}
    return _bytes(chosen, MEMORY, MEMORY_BYTES), _bytes(chosen, DISK, DISK_BYTES)


def _bytes(chosen: object, name: str, default: int) -> int:
    value = chosen.get(name) if isinstance(chosen, dict) else None
    return max(0, int(value * 2**30)) if isinstance(value, (int, float)) else default
