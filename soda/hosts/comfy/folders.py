"""Where SODA files are looked for: the model folder "soda", the soda/ subfolder of every loras root, output/loras/soda
where SODA Save writes, and the adapters that the pack brings along for its playground.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import folder_paths

from ... import file
from ...adapter import Adapter
from ...errors import SodaFileError

FOLDER = "soda"
SHIPPED = Path(__file__).resolve().parents[3] / "playground" / "adapters"
FILES = 16  # adapters kept in memory, 5 MB each for SDXL
LORAS = "loras"
SAVE_SUBFOLDER = os.path.join(LORAS, "soda")


def register() -> None:
    """Make "soda" a ComfyUI model folder. A path given in extra_model_paths.yaml stays and is searched as well."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER), is_default=True)
    for root in folder_paths.get_folder_paths("loras"):
        folder_paths.add_model_folder_path(FOLDER, os.path.join(root, FOLDER))
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.get_output_directory(), SAVE_SUBFOLDER))
    folder_paths.add_model_folder_path(FOLDER, str(SHIPPED))
    folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


def adapter_names() -> list[str]:
    """The names a combo widget offers, sorted, relative to the folder each file lies in."""
    return folder_paths.get_filename_list(FOLDER)


def resolve(name: str) -> str:
    """The file of a name that came from a prompt. It is untrusted: only registered folders are searched."""
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        searched = ", ".join(folder_paths.get_folder_paths(FOLDER))
        raise SodaFileError(
            f"There is no SODA adapter named {name!r}. Searched: {searched}. "
            "Put the file into one of these folders and refresh the page, or pick another one."
        )
    return path


def load(name: str) -> Adapter:
    """The adapter of a name that came from a prompt."""
    return read(resolve(name))


def read(path: str) -> Adapter:
    """The adapter in a file, which is read once while it stays as it is."""
    status = os.stat(path)
    return _read(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=FILES)
def _read(path: str, _size: int, _time: int) -> Adapter:
    return file.load(path)


def fingerprint(name: str) -> str:
    """Changes when the file of that name is replaced: its path, size and modification time."""
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        return f"{name} is missing"
    status = os.stat(path)
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def next_save_path(prefix: str, subfolder: str = SAVE_SUBFOLDER) -> str:
    """A path in output/loras/soda, or another subfolder of the output folder, that does not exist:
    `<prefix>_00001_.safetensors`, counting up.

    The prefix may hold subfolders and ComfyUI's %year%-like fields; leaving the folder is refused by ComfyUI.
    """
    root = os.path.join(folder_paths.get_output_directory(), subfolder)
    os.makedirs(root, exist_ok=True)
    folder, stem, counter, _, _ = folder_paths.get_save_image_path(prefix, root)
    while True:
        path = os.path.join(folder, f"{stem}_{counter:05}_.safetensors")
        if not os.path.exists(path):
            return path
        counter += 1


def shown(path: str) -> str:
    """A path in the output folder from that folder's name on, for a node is narrow."""
    return os.path.relpath(path, os.path.dirname(folder_paths.get_output_directory()))
