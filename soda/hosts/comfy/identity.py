"""One hash of everything that a training's result follows from, to know it again after a restart.

The weights that an adapter changes are hashed whole, all others of the model by numbers spread over each.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ...adapter import Adapter
from ...content import THREADS
from ...fingerprint import tensor_hash
from .base import layer_weight, unpatched
from .bypass import installed
from .targets import text_attention_weights

VERSION = 1  # of what is hashed and of what a run keeps; other numbers never meet
SPREAD = 4096  # numbers of a weight that is not adapted
LARGEST = 1 << 24  # numbers of a tensor beyond the model's that are hashed whole
_weights: WeakKeyDictionary = WeakKeyDictionary()  # model -> {layer or key: hash}


def layer_hashes(patcher: ModelPatcher, layers: Mapping[str, str]) -> dict[str, str]:
    """Layer name -> hash of its unpatched weight; computed once while the model is in memory."""
    known = _weights.setdefault(patcher.model, {})
    new = [layer for layer in layers if layer not in known]
    with ThreadPoolExecutor(THREADS) as pool:
        known.update(zip(new, pool.map(lambda layer: tensor_hash(layer_weight(patcher, layer)), new), strict=True))
    return {layer: known[layer] for layer in layers}


def run_hash(patcher: ModelPatcher, layers: Mapping[str, str], *inputs: object) -> str:
    """SHA-256 of the model, its patches and options, and `inputs` of any kind."""
    digest = _Digest()
    digest.add(VERSION)
    digest.add(layer_hashes(patcher, layers))
    digest.add(_rest_hash(patcher))
    digest.add(patcher.patches)
    digest.add(installed(patcher))
    digest.add(patcher.object_patches)
    digest.add(patcher.model_options)
    for value in inputs:
        digest.add(value)
    return digest.sha.hexdigest()


def _rest_hash(patcher: ModelPatcher) -> str:
    known = _weights.setdefault(patcher.model, {})
    if "" not in known:
        digest, model = _Digest(), patcher.model
        held = {name for tensors in (model.named_parameters(), model.named_buffers()) for name, _ in tensors}
        for key in sorted(held & patcher.model_state_dict().keys()):  # scales of a quantised weight are no tensors here
            digest.add(key)
            digest.add(_spread(unpatched(patcher, key), SPREAD))
        known[""] = digest.sha.hexdigest()
    return known[""]


def _spread(tensor: torch.Tensor, count: int) -> torch.Tensor:
    return tensor if tensor.numel() <= count else tensor.reshape(-1)[:: -(-tensor.numel() // count)]


class _Digest:
    """SHA-256 over nested values. An object counts by its class and its attributes, a function by its code.

    Without the names of modules: ComfyUI calls a pack's by the path that it is installed in.
    """

    def __init__(self) -> None:
        self.sha = hashlib.sha256()
        self._within: set[int] = set()

    def add(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._say(f"tensor {value.dtype} {tuple(value.shape)} {tensor_hash(_spread(value, LARGEST))}")
        elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
            self._say(f"{type(value).__name__} {value!r}")
        elif isinstance(value, Adapter):
            self._say(f"adapter {value.content_hash}")
        elif id(value) in self._within:
            self._say("again")
        else:
            self._within.add(id(value))
            self._parts(value)
            self._within.discard(id(value))

    def _parts(self, value: Any) -> None:
        self._say(type(value).__qualname__)
        if isinstance(value, Mapping):
            for key in sorted(value, key=str):
                self._say(str(key))
                self.add(value[key])
        elif isinstance(value, (list, tuple)):
            self._all(value)
        elif isinstance(value, (set, frozenset)):
            self._all(sorted(value, key=str))
        elif isinstance(value, type):
            self._say(value.__qualname__)
        elif isinstance(value, torch.nn.Module):
            self.add(dict(value.state_dict()))
        elif isinstance(value, types.MethodType):
            self._all((value.__func__, value.__self__))
        elif isinstance(value, types.FunctionType):
            self._say(f"{value.__qualname__} {value.__code__.co_code.hex()}")
            self._all((value.__defaults__, [cell.cell_contents for cell in value.__closure__ or ()]))
        elif isinstance(value, CLIP):  # one to train
            layers = text_attention_weights(value.patcher)
            self._say(run_hash(value.patcher, layers, value.layer_idx, value.tokenizer_options))
        elif isinstance(value, ModelPatcher):
            self._all((value.patches, _rest_hash(value)))
        elif is_dataclass(value):
            self._all([getattr(value, field.name) for field in fields(value)])
        else:
            self.add(dict(getattr(value, "__dict__", {})))
        self._say("end")

    def _all(self, values: Any) -> None:
        for value in values:
            self.add(value)

    def _say(self, text: str) -> None:
        self.sha.update(f"{text}\0".encode())
