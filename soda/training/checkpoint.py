"""A run's state as one safetensors file: nested dicts and lists of tensors, numbers, strings and None.

The tensors are numbered; where each belongs, and all that is no tensor, is JSON in the file's metadata. A digest of
the tensors' bytes finds damage that the format does not see. Nothing is ever unpickled. Writing is atomic.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import replace_file
from ..errors import SodaFileError

VERSION = "1"


def write(path: Path, state: dict[str, Any]) -> None:
    """Raises SodaFileError where the folder cannot be written to."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_pack(state, tensors))
    metadata = {"soda.checkpoint": VERSION, "state": tree, "digest": _digest(tree, tensors)}
    replace_file(path, lambda file: save_file(tensors, file, metadata))


def read(path: Path) -> dict[str, Any]:
    """The state, its tensors on the CPU. Raises SodaFileError for a missing, damaged or other file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("soda.checkpoint") != VERSION:
                raise SodaFileError(f"{path}: this is no checkpoint of a training run; delete it and train anew")
            # Copied: a mapped file cannot be replaced on Windows, and ends the process where it shrinks.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if metadata["digest"] != _digest(metadata["state"], tensors):
            raise SodaFileError(f"{path}: the checkpoint is damaged; delete it and train anew")
        return _unpack(json.loads(metadata["state"]), tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, SodaFileError):
            raise
        raise SodaFileError(f"{path}: the checkpoint cannot be read ({error}); delete it and train anew") from error


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`. Dicts as pairs, since optimizers number their parameters and JSON has no such keys."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list):
        return [_pack(item, tensors) for item in value]
    return value


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _unpack(item, tensors) for key, item in value["dict"]}
    return value


def _digest(tree: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(tree.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
