"""Saved pictures name their adapters: files, weights and hashes, in the metadata that ComfyUI's save nodes write.

A workflow names files alone, and another file may have that name tomorrow. Whenever a prompt is queued, the adapters
that it applies are added to its `extra_pnginfo`, of which every save node writes all keys. Done by the nodes as they
run, it would be missing from the second picture: nodes whose results are cached do not run.

    soda: [{"node": "4", "name": "pom.safetensors", "weight": 0.8, "role": "subject",
            "hashes": {"SHA256": ..., "AutoV2": ..., "AutoV3": ...}}, ...]

The hashes are those by which Civitai and LoRA managers know a file: SHA-256 of the whole, its first 10 digits, and the
first 12 of the SHA-256 of what follows the header. An adapter that is trained in the same prompt has no file yet; it is
named after its node.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import folder_paths
from safetensors import SafetensorError, safe_open
from server import PromptServer

from ..soda.errors import SodaFileError
from ..soda.file import is_adapter
from ..soda.hosts.comfy import folders
from .mix import WIRED, row_prefixes

KEY = "soda"
STOCK = ("LoraLoader", "LoraLoaderModelOnly")
Prompt = dict[str, Any]  # API format: {id: {class_type, inputs}}
Used = tuple[str, Any, str]  # file, or the node that an adapter comes from; weight; role ("" for the file's own)


def register() -> None:
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(add_adapters)


def add_adapters(request: Any) -> Any:
    """What a page posted to queue a prompt, with the adapters in it. Anything odd is left to ComfyUI's validation."""
    prompt = request.get("prompt") if isinstance(request, dict) else None
    if isinstance(prompt, dict) and (found := adapters_of(prompt)):
        extra = request.get("extra_data") or {}
        request["extra_data"] = extra | {"extra_pnginfo": (extra.get("extra_pnginfo") or {}) | {KEY: found}}
    return request


def adapters_of(prompt: Prompt) -> list[dict[str, Any]]:
    """The adapters that the prompt puts onto a model, in the order of its nodes."""
    links = {tuple(v) for node in prompt.values() for v in _inputs(node).values() if _is_link(v)}
    entries = []
    for node_id, node in prompt.items():
        inputs, kind = _inputs(node), node.get("class_type") if isinstance(node, dict) else ""
        if not {(node_id, 0), (node_id, 1)} & links:  # of its model, its text encoder or its stack nothing is used
            continue
        used: list[Used] = []
        if kind in ("SodaLoader", "SodaStack"):
            used = [(str(inputs.get("adapter_name")), inputs.get("strength", 1.0), "")]
        elif kind == "SodaMix":
            used = list(_mixed(prompt, inputs))
        elif kind in STOCK:
            used = _stock(inputs)
        entries += [{"node": node_id} | _entry(*one) for one in used if one[1] != 0]
    return entries


def _inputs(node: Any) -> dict[str, Any]:
    inputs = node.get("inputs") if isinstance(node, dict) else None
    return inputs if isinstance(inputs, dict) else {}


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _mixed(prompt: Prompt, inputs: dict[str, Any], depth: int = 0) -> Iterator[Used]:
    """The parts of a SODA Mix: its rows, then the sockets that no row weighs."""
    sockets = sorted((len(name), name) for name in inputs if name.startswith("adapters.") and _is_link(inputs[name]))
    wired = [inputs[name][0] for _, name in sockets]
    rows = [(inputs.get(f"{p}adapter_name"), inputs.get(f"{p}weight"), inputs.get(f"{p}role", "auto"))
            for p in row_prefixes(inputs)]  # fmt: skip
    for name, weight, role in rows:
        role = "" if role == "auto" else role
        if name != WIRED:
            yield str(name), weight, role
        elif wired:
            yield from _wired(prompt, wired.pop(0), weight, role, depth)
    for source in wired:
        yield from _wired(prompt, source, 1.0, "", depth)


def _wired(prompt: Prompt, source: str, weight: Any, role: str, depth: int) -> Iterator[Used]:
    """The adapters behind the adapter output of a node, at a weight."""
    node = prompt.get(source)
    kind, inputs = (node.get("class_type") if isinstance(node, dict) else None), _inputs(node)
    if kind == "SodaLoader":
        yield str(inputs.get("adapter_name")), weight, role
    elif kind == "SodaMix" and depth < len(prompt):
        for name, own, part in _mixed(prompt, inputs, depth + 1):
            known = all(isinstance(number, (int, float)) for number in (own, weight))
            yield name, own * weight if known else None, role or part
    else:
        yield f"from node {source}, {kind}", weight, role


def _stock(inputs: dict[str, Any]) -> list[Used]:
    """A SODA file in one of ComfyUI's own LoRA loaders."""
    name = inputs.get("lora_name")
    path = folder_paths.get_full_path("loras", name) if isinstance(name, str) else None
    return [(path, inputs.get("strength_model"), "")] if path is not None and is_adapter(path) else []


def _entry(name: str, weight: Any, role: str) -> dict[str, Any]:
    """What the metadata say of one adapter; a weight that a link brings is not known yet."""
    entry: dict[str, Any] = {"name": os.path.basename(name)}
    if isinstance(weight, (int, float)):
        entry["weight"] = weight
    try:
        path = name if os.path.isabs(name) else folders.resolve(name)
        status = os.stat(path)
        own, hashes = _known(path, status.st_size, status.st_mtime_ns)
    except (SodaFileError, SafetensorError, OSError, ValueError):  # the node says what is wrong with it
        return entry | ({"role": role} if role else {})
    return entry | {"role": role or own, "hashes": hashes}


@lru_cache(maxsize=256)
def _known(path: str, size: int, changed: int) -> tuple[str, dict[str, str]]:
    """(role, hashes) of a file, as of that size and time of change."""
    with open(path, "rb") as file:
        start = file.read(8)
        header = file.read(min(int.from_bytes(start, "little"), size))
        body = file.read()
    whole, data = hashlib.sha256(start + header + body).hexdigest(), hashlib.sha256(body).hexdigest()
    with safe_open(path, framework="np") as opened:
        role = (opened.metadata() or {}).get("soda.role", "other")
    return role, {"SHA256": whole, "AutoV2": whole[:10], "AutoV3": data[:12]}
