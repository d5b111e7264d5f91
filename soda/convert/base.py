"""The weights of a base model, read from its file one by one as they are asked for.

The file is a whole checkpoint or a UNet alone (`.safetensors`), in the names of LDM and ComfyUI or of diffusers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..adapter import split_rows
from ..errors import SodaFileError, unreadable
from .names import to_comfy

Progress = Callable[[int, int], None]  # weights done, of all
READABLE = ("F64", "F32", "F16", "BF16")
PREFIXES = (
    ("model.diffusion_model.", "diffusion_model."),
    ("conditioner.embedders.0.transformer.", "clip_l.transformer."),
    ("cond_stage_model.transformer.", "clip_l.transformer."),
    ("input_blocks.", "diffusion_model.input_blocks."),
    ("middle_block.", "diffusion_model.middle_block."),
    ("output_blocks.", "diffusion_model.output_blocks."),
)
OPEN_CLIP = re.compile(
    r"conditioner\.embedders\.1\.model\.transformer\.resblocks\.([0-9]+)\.attn\.(in_proj_|out_proj\.)weight"
)
CLIP_G = "clip_g.transformer.text_model.encoder.layers.{}.self_attn.{}_proj"
ATTENTION = re.compile(r"diffusion_model\..+\.attn[12]\.to_(?:q|k|v|out\.0)")


class Weights(Protocol):
    """Matrices `(out, in)` by layer name, from wherever a base comes; `path` is what messages call it."""

    path: Path

    def __getitem__(self, layer: str) -> Tensor: ...

    def shape(self, layer: str) -> tuple[int, int]:
        """(out, in), without reading the weight."""

    def stored_shape(self, layer: str) -> tuple[int, ...]:
        """As the model stores it: of a 1 x 1 convolution (out, in, 1, 1)."""

    def attention(self) -> list[str]:
        """The attention projections of a Stable Diffusion UNet, which tell its family."""


class BaseWeights(Mapping[str, Tensor]):
    """Matrices `(out, in)` by layer name as adapters spell it; `name[a:b]` gives rows a to b.

    Raises SodaFileError if the file cannot be read; a weight that is not there, or is stored in a type that holds no
    plain numbers (fp8, integers), raises it when it is asked for.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self._file = safe_open(self.path, framework="pt", device="cpu")
            self._keys = dict(entry for key in self._file.keys() for entry in _entries(key))  # noqa: SIM118
        except OSError as error:
            raise unreadable(self.path, error, "the checkpoint or UNet as a .safetensors file") from None
        except (SafetensorError, RuntimeError) as error:  # RuntimeError: no room to map it
            raise SodaFileError(
                f"{self.path}: the base cannot be read ({error}); give the checkpoint or UNet as a .safetensors file"
            ) from error

    def _place(self, layer: str) -> tuple[str, int, int]:
        """Key in the file, and rows."""
        path, rows = split_rows(layer)
        if path not in self._keys:
            raise SodaFileError(f"{self.path}: the base has no weight for layer {layer!r}; give the base of its model")
        key, third = self._keys[path]
        view = self._file.get_slice(key)
        shape, dtype = view.get_shape(), view.get_dtype()
        if dtype not in READABLE or len(shape) != 2:
            raise SodaFileError(
                f"{self.path}: tensor {key!r} is {dtype} of shape {tuple(shape)}, a matrix in {', '.join(READABLE)} is "
                "needed; give the base in fp16 or fp32"
            )
        height = shape[0] if third is None else shape[0] // 3
        first, last = rows or (0, height)
        if not 0 <= first < last <= height:
            raise SodaFileError(f"{self.path}: layer {layer!r} is more than the {height} rows of tensor {key!r}")
        start = 0 if third is None else third * height
        return key, start + first, start + last

    def shape(self, layer: str) -> tuple[int, int]:
        """(out, in), without reading the weight."""
        key, first, last = self._place(layer)
        return last - first, self._file.get_slice(key).get_shape()[1]

    def stored_shape(self, layer: str) -> tuple[int, ...]:
        """Matrices are all that is read here."""
        return self.shape(layer)

    def __getitem__(self, layer: str) -> Tensor:
        key, first, last = self._place(layer)
        return self._file.get_slice(key)[first:last]

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, str) and split_rows(layer)[0] in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def attention(self) -> list[str]:
        """The attention projections of the UNet."""
        return [layer for layer in self._keys if ATTENTION.fullmatch(layer)]


def _entries(key: str) -> Iterator[tuple[str, tuple[str, int | None]]]:
    """Layer name -> (key, which third of the rows or None for all) for the layers that a tensor holds."""
    clip = OPEN_CLIP.fullmatch(key)
    if clip is not None and clip[2] == "out_proj.":
        yield CLIP_G.format(clip[1], "out"), (key, None)
    elif clip is not None:
        yield from ((CLIP_G.format(clip[1], part), (key, third)) for third, part in enumerate("qkv"))
    elif key.endswith(".weight"):
        yield _layer_name(key.removesuffix(".weight")), (key, None)


def _layer_name(path: str) -> str:
    for prefix, name in PREFIXES:
        if path.startswith(prefix):
            return name + path[len(prefix) :]
    try:
        return to_comfy(path)
    except SodaFileError:
        return path
