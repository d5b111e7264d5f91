"""SODA files, format 1: safetensors with names and shapes that say everything a loader needs.

Per adapted weight, named by the host's module path:

    <layer>.soda_lq | .soda_svd | .soda_qr    delta (k,); absent for `none`
    <layer>.soda_log_R0 ... soda_log_R4       strict upper triangle of A_j, n_j (n_j - 1) / 2 numbers
    <layer>.soda_sketch                       (8, 8), the fingerprint of D on the base

fp32 unless asked otherwise. Every tensor is checked on reading; nothing is ever unpickled. Writing is atomic: at any
moment the path holds the old file or the new one.

Metadata (see `metadata`) is for people and tools; the tensors alone say what the adapter does. So a file whose metadata
another tool took off, its format version too, is read as format 1: the same adapter, of role `other` and unknown base.
A later format must therefore give its tensors other names.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_bytes
from torch import Tensor

from .adapter import Adapter, Decomposition, Layer, factor_size
from .atomic import replace_file
from .errors import SodaFileError, unreadable
from .fingerprint import SKETCH_SIZE
from .kronecker import MAX_FACTORS
from .metadata import FORMAT_VERSION

HEADER_LIMIT = 1 << 20  # ComfyUI's model sidebar reads no longer header
HEADER_LIMIT_READ = 8 << 20  # a parser that is handed more would take memory without bounds
LARGEST_LOG = 1000.0  # radians; beyond, exp(A) loses its digits, and training comes nowhere near
TENSOR_LIMIT = 1 << 24  # numbers in one tensor: the triangle of a 5792 x 5792 factor
FILE_LIMIT = 1 << 30  # bytes; SDXL's attention takes 5 MB
NAME = re.compile(r"(?P<layer>.+)\.soda_(?P<part>lq|svd|qr|sketch|log_R(?P<factor>[0-9]))")
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES = ("F64", "F32", "F16", "BF16")


def load(path: str | os.PathLike) -> Adapter:
    """The adapter in a file, fp32 on the CPU, named by the file's stem, with the metadata that it still has.

    Raises SodaFileError, which names the file, the tensor, what is wrong with it and what to do.
    """
    path = Path(path)
    try:
        _check_header(path)
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            _check_version(path, metadata)
            _check_names(path, file)
        # Into memory, not mapped: a mapped file cannot be replaced on Windows, and ends the process where it shrinks.
        tensors = from_bytes(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error, "an existing SODA adapter") from None
    except (SafetensorError, ValueError) as error:
        if isinstance(error, SodaFileError):
            raise
        raise SodaFileError(
            f"{path}: this is no readable safetensors file ({error}); it may be truncated or of another format. "
            "Download or save it again"
        ) from error
    parts: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):  # safetensors hands them over in any order
        name, _, part = key.rpartition(".soda_")
        parts.setdefault(name, {})[part] = tensors[key].to(torch.float32)
    if not parts:
        raise SodaFileError(f"{path}: the file holds no SODA layer; choose a file that SODA Save wrote")
    layers = {name: (read_layer(path, name, found),) for name, found in parts.items()}
    return Adapter(layers, metadata, path.stem)


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether the file is a SODA adapter by the names of its tensors, without reading them."""
    try:
        with safe_open(path, framework="np") as file:
            return NAME.fullmatch(next(iter(file.keys()), "")) is not None
    except (SafetensorError, OSError):
        return False


def validate(path: str | os.PathLike) -> tuple[bool, str]:
    """(True, "") if `load` accepts the file, else (False, what it says)."""
    try:
        load(path)
    except SodaFileError as error:
        return False, str(error)
    return True, ""


def validate_layer(name: str, layer: Layer) -> tuple[bool, str]:
    """(True, "") if format 1 can hold the layer, else (False, which layer or tensor is wrong, and how)."""
    whole = f"layer {_short(name)}"
    if not 1 <= len(layer.logs) <= MAX_FACTORS:
        return False, f"{whole} has {len(layer.logs)} factors, allowed are soda_log_R0 to soda_log_R{MAX_FACTORS - 1}"
    if (layer.delta is None) != (layer.decomposition == "none"):
        return False, f"{whole} is of decomposition {layer.decomposition!r}; all but 'none' need a spectrum"
    for part, tensor in _parts(layer):
        peak, wrong = float(tensor.abs().max()) if tensor.numel() else 0.0, ""
        if tuple(tensor.shape) != (SKETCH_SIZE, SKETCH_SIZE) if part == "soda_sketch" else tensor.dim() != 1:
            wrong = f"has shape {tuple(tensor.shape)}"
        elif not math.isfinite(peak):
            wrong = "holds NaN or infinite numbers, as after a training that diverged"
        elif part.startswith("soda_log") and peak > LARGEST_LOG:
            wrong = f"holds an angle of {peak:g}, the most allowed is {LARGEST_LOG:g}"
        if wrong:
            return False, f"tensor {_short(f'{name}.{part}')} {wrong}"
    for j, log in enumerate(layer.logs):
        try:
            factor_size(log.numel())
        except ValueError as error:
            return False, f"tensor {_short(f'{name}.soda_log_R{j}')} has a wrong length: {error}"
    if layer.delta is not None and not 1 <= layer.delta.numel() <= layer.dimension:
        return (
            False,
            f"{whole} has {layer.delta.numel()} numbers in its spectrum, but turns {layer.dimension} dimensions",
        )
    return True, ""


def save(adapter: Adapter, path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> None:
    """Write the adapter, with `dtype` fp32, fp16 or bf16; an existing file is replaced in one step.

    Raises SodaFileError if the adapter is a mix without a common small form, holds no layer or a number that is not
    finite in `dtype`, or says more than a header may hold.
    """
    path = Path(path)
    single, reason = adapter.is_single_form()
    if not single:
        raise SodaFileError(f"{path}: {reason}; save the adapters one by one, or save the model with the mix baked in")
    if not adapter.layers:
        raise SodaFileError(f"{path}: the adapter has no layer, there is nothing to save")
    tensors: dict[str, Tensor] = {}
    for name, (layer,) in adapter.layers.items():
        ok, reason = validate_layer(name, layer)
        if not ok:
            raise SodaFileError(f"{path}: {reason}; train it again with a lower learning rate")
        tensors |= {f"{name}.{part}": tensor.detach().to("cpu", dtype).contiguous() for part, tensor in _parts(layer)}
    for key, tensor in tensors.items():
        if not NAME.fullmatch(key):
            raise SodaFileError(f"{path}: {_short(key)} cannot name a tensor; give the layer its module path as name")
        if not tensor.isfinite().all():
            raise SodaFileError(
                f"{path}: tensor {_short(key)} has a number that is not finite in {dtype}; save it in fp32"
            )
    header: dict[str, object] = {}
    chunks: list[bytes] = []
    end = 0
    for key in sorted(tensors):
        chunks.append(tensors[key].view(torch.uint8).numpy().tobytes())
        start, end = end, end + len(chunks[-1])
        header[key] = {"dtype": NAMES[dtype], "shape": list(tensors[key].shape), "data_offsets": [start, end]}
    body = b"".join(chunks)
    digest = hashlib.sha256(body).hexdigest()
    metadata = {"soda.format_version": FORMAT_VERSION, **adapter.metadata}
    metadata |= {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise SodaFileError(
            f"{path}: the header would take {len(text)} bytes, of which tools read {HEADER_LIMIT}; "
            "use a smaller thumbnail"
        )
    replace_file(path, lambda file: file.write_bytes(len(text).to_bytes(8, "little") + text + body))


def _parts(layer: Layer) -> Iterator[tuple[str, Tensor]]:
    """What stands behind the layer's name in the file, and the tensor."""
    if layer.delta is not None:
        yield f"soda_{layer.decomposition}", layer.delta
    for j, log in enumerate(layer.logs):
        yield f"soda_log_R{j}", log
    if layer.sketch is not None:
        yield "soda_sketch", layer.sketch


def _check_header(path: Path) -> None:
    """The header's length is the file's first 8 bytes; a pickle's first bytes make a number out of all proportion."""
    with path.open("rb") as file:
        start = file.read(8)
    length = int.from_bytes(start, "little")
    if length <= HEADER_LIMIT_READ:
        return
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        raise SodaFileError(f"{path}: this is a pickle, which may run code and is never opened; ask for a .safetensors")
    raise SodaFileError(
        f"{path}: this is no readable safetensors file (its header would take {length} bytes); it may be of another "
        "format. Download it again"
    )


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    version = metadata.get("soda.format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise SodaFileError(
            f"{path}: the file has SODA format {_short(version)}, this version reads {_short(FORMAT_VERSION)}; "
            "update the node pack"
        )


def _check_names(path: Path, file: safe_open) -> None:
    """Every tensor's name, type and shape, before any is read: a checkpoint chosen by mistake takes no memory."""
    keys = list(file.keys())
    for key in keys:
        match = NAME.fullmatch(key)
        if match is None:
            lora = any("lora" in other for other in keys)
            hint = "the file looks like a LoRA; load it with Load LoRA" if lora else "choose a SODA adapter"
            raise SodaFileError(f"{path}: tensor {_short(key)} is no part of a SODA adapter; {hint}")
        view = file.get_slice(key)
        dtype, shape = view.get_dtype(), tuple(view.get_shape())
        if dtype not in DTYPES:
            raise SodaFileError(
                f"{path}: tensor {_short(key)} is of type {dtype}, a SODA adapter holds {', '.join(DTYPES)}; "
                "save or convert it again"
            )
        sketch = match["part"] == "sketch"
        if shape != (SKETCH_SIZE, SKETCH_SIZE) if sketch else len(shape) != 1 or shape[0] > TENSOR_LIMIT:
            expected = (SKETCH_SIZE, SKETCH_SIZE) if sketch else "(numbers,)"
            raise SodaFileError(f"{path}: tensor {_short(key)} has shape {shape}, expected {expected}; save it again")
    size = path.stat().st_size
    if size > FILE_LIMIT:
        raise SodaFileError(f"{path}: the file has {size} bytes, an adapter at most {FILE_LIMIT}; save it again")


def read_layer(path: str | os.PathLike, name: str, tensors: Mapping[str, Tensor]) -> Layer:
    """One layer from its tensors by what stands behind `.soda_` in their names, checked; `path` is for the message.

    Raises SodaFileError.
    """

    def fail(what: str) -> SodaFileError:
        return SodaFileError(f"{path}: {what}; the file is damaged, save or download it again")

    kinds: list[Decomposition] = [kind for kind in ("lq", "svd", "qr") if kind in tensors]
    if len(kinds) > 1:
        spectra = ", ".join("soda_" + kind for kind in kinds)
        raise fail(f"layer {_short(name)} has more than one spectrum ({spectra})")
    count = sum(part.startswith("log_R") for part in tensors)
    if not count or any(f"log_R{j}" not in tensors for j in range(count)):
        found = ", ".join(sorted(f"soda_{part}" for part in tensors))
        raise fail(f"layer {_short(name)} needs soda_log_R0, soda_log_R1, ... without gaps and has {found}")
    logs = tuple(tensors[f"log_R{j}"] for j in range(count))
    layer = Layer(kinds[0] if kinds else "none", tensors[kinds[0]] if kinds else None, logs, tensors.get("sketch"))
    ok, reason = validate_layer(name, layer)
    if not ok:
        raise fail(reason)
    return layer


def _short(name: str) -> str:
    """A name fit for a message, whatever the file put there."""
    text = json.dumps(name)
    return text if len(text) <= 120 else text[:117] + '..."'
