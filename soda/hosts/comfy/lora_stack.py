"""LORA_STACK, the type by which Efficiency Nodes, Comfyroll, LoRA Manager and others hand on a choice of LoRAs: a list
of (name, strength for the model, strength for the text encoder), names as ComfyUI's `loras` folders list them.

In such a list SODA files stand among LoRAs. Other packs' nodes load both one after the other by ComfyUI's LoRA loader;
here the SODA files become part of the mix, which comes first, and the LoRAs go on top.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths

from ...adapter import Adapter
from ...errors import SodaFileError, SodaMixError
from ...file import is_adapter
from .folders import read, resolve

Entry = tuple[str, float, float]
EMPTY = ("", "None", None)


def split(stack: Sequence[Any]) -> tuple[list[tuple[Adapter, float, float]], list[Entry]]:
    """(SODA adapters, LoRAs by path) of a stack, each with its two strengths; without those at 0 for both.

    Raises SodaMixError for what is no such stack, and SodaFileError for a name that no loras folder has.
    """
    adapters, loras = [], []
    for entry in stack:
        if not isinstance(entry, (tuple, list)) or len(entry) != 3:
            raise SodaMixError(
                f"The LoRA stack holds a {type(entry).__name__} where (name, model strength, clip strength) belongs: "
                "wire a node whose LORA_STACK is made for Apply LoRA Stack and the like."
            )
        name, strength, strength_clip = entry
        if name in EMPTY or not (strength or strength_clip):
            continue
        path = folder_paths.get_full_path("loras", name)
        if path is None:
            searched = ", ".join(folder_paths.get_folder_paths("loras"))
            raise SodaFileError(
                f"The LoRA stack names {name!r}, which is in none of the loras folders ({searched}): pick another "
                "file in the node that makes the stack."
            )
        if is_adapter(path):
            adapters.append((read(path), float(strength), float(strength_clip)))
        else:
            loras.append((path, float(strength), float(strength_clip)))
    return adapters, loras


def apply_loras(model, clip, loras: Sequence[Entry]):
    """(model, clip) with the LoRAs on top, by ComfyUI's own loader; clip may be None."""
    for path, strength, strength_clip in loras:
        tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
        model, clip = comfy.sd.load_lora_for_models(model, clip, tensors, strength, strength_clip, metadata)
    return model, clip


def entry(adapter_name: str, strength: float, strength_clip: float) -> Entry:
    """What other packs' nodes need to load an adapter of SODA Loader's list.

    Raises SodaFileError if it lies outside the loras folders, where they do not look.
    """
    path = resolve(adapter_name)
    for root in folder_paths.get_folder_paths("loras"):
        if folder_paths.is_within_directory(root, path):
            return os.path.relpath(os.path.realpath(path), os.path.realpath(root)), strength, strength_clip
    raise SodaFileError(
        f"{path} lies outside the loras folders, where the nodes behind a LoRA stack look: move or copy it to "
        f"{os.path.join(folder_paths.get_folder_paths('loras')[0], 'soda')}."
    )
