"""Metadata of adapters trained and saved in ComfyUI: what the host knows, in the words of `soda.metadata`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image

from ...adapter import Adapter
from ...atomic import replace_file
from ...file import save
from ...fingerprint import joint_hash
from ...metadata import describe, label, thumbnail_of, with_thumbnail
from .preview import image_of
from .task import Task

# ComfyUI's model configuration -> the identifier that modelspec gives the base architecture.
ARCHITECTURES = {
    "SD15": "stable-diffusion-v1",
    "SD20": "stable-diffusion-v2-512",
    "SDXL": "stable-diffusion-xl-v1-base",
    "SDXLRefiner": "stable-diffusion-xl-v1-refiner",
    "SSD1B": "stable-diffusion-xl-v1-base",
    "Flux": "flux-1-dev",
    "PlaygroundModel": "soda-playground",
}
THUMBNAIL_SIDE, PREVIEW_SIDE = 256, 512  # in the file, beside it


def architecture(patcher: ModelPatcher) -> str:
    """The modelspec architecture of adapters for this model: <base architecture>/soda."""
    family = type(patcher.model.model_config).__name__
    return f"{ARCHITECTURES.get(family, family.lower())}/soda"


def base_name(patcher: ModelPatcher) -> str:
    """The checkpoint's file name without its ending, where its loader left it; else ComfyUI's name of the family.

    A file that is just called "model" goes by the name of its folder.
    """
    source = patcher.cached_patcher_init
    if source is not None and source[1] and isinstance(source[1][0], str):
        path = Path(source[1][0])
        return path.parent.name if path.stem == "model" else path.stem
    return type(patcher.model.model_config).__name__


def jpeg(picture: Image.Image, side: int = THUMBNAIL_SIDE) -> bytes:
    """A picture as a JPEG of at most `side` px a side."""
    picture = picture.copy()
    picture.thumbnail((side, side))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return out.getvalue()


def training_metadata(task: Task, hashes: Mapping[str, str], sample: Image.Image | None = None) -> dict[str, str]:
    """Metadata of a freshly trained adapter; `hashes` are those of the base weights it was trained on, by layer. A
    sample of it becomes its thumbnail."""
    training = {
        **asdict(task.settings),
        "decomposition": task.decomposition,
        "factors": task.factors,
        "targets": task.resolved(),
        "images": len(task.samples),
        "latent_sizes": task.latent_sizes(),
    }
    described = describe(
        title="untitled",
        role=task.role,
        architecture=architecture(task.model),
        base_model=base_name(task.model),
        base_hash=joint_hash(hashes),
        training=training,
    )
    return described if sample is None else with_thumbnail(described, jpeg(sample))


def save_described(adapter: Adapter, path: str, trigger_words: str, thumbnail: torch.Tensor | None) -> None:
    """Save the adapter with what is known now added to its metadata, and its picture beside it as `<name>.jpg`, where
    LoRA Manager, rgthree and the webuis look for one. `thumbnail` is an IMAGE; None takes the picture it has."""
    title = Path(path).stem
    picture = None if thumbnail is None else image_of(thumbnail[..., :3])
    metadata = label(
        adapter.metadata, title=title, trigger_words=trigger_words, thumbnail=None if picture is None else jpeg(picture)
    )
    save(replace(adapter, metadata=metadata, name=title), path)
    preview = thumbnail_of(metadata) if picture is None else jpeg(picture, PREVIEW_SIDE)
    if preview is not None:
        replace_file(Path(path).with_suffix(".jpg"), lambda file: file.write_bytes(preview))
