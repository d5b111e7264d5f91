"""Metadata of adapters trained and saved in ComfyUI: what the host knows, in the words of `soda.metadata`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher

from ...adapter import Adapter, Decomposition
from ...fingerprint import joint_hash
from ...metadata import describe, label
from ...training.settings import TrainingSettings
from .dataset import Sample
from .preview import image_of

# ComfyUI's model configuration -> the identifier that modelspec gives the base architecture.
ARCHITECTURES = {
    "SD15": "stable-diffusion-v1",
    "SD20": "stable-diffusion-v2-512",
    "SDXL": "stable-diffusion-xl-v1-base",
    "SDXLRefiner": "stable-diffusion-xl-v1-refiner",
    "SSD1B": "stable-diffusion-xl-v1-base",
    "PlaygroundModel": "soda-playground",
}
THUMBNAIL_SIDE = 256


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


def thumbnail_jpeg(image: torch.Tensor) -> bytes:
    """The first picture of an IMAGE tensor as a JPEG of at most 256 px a side."""
    picture = image_of(image[..., :3])
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return out.getvalue()


def training_metadata(
    patcher: ModelPatcher, samples: Sequence[Sample], settings: TrainingSettings, decomposition: Decomposition,
    factors: int, role: str, targets: str, hashes: Mapping[str, str],
) -> dict[str, str]:  # fmt: skip
    """Metadata of a freshly trained adapter; `hashes` are those of the base weights it was trained on, by layer."""
    training = {
        **asdict(settings),
        "decomposition": decomposition,
        "factors": factors,
        "targets": targets,
        "images": len(samples),
        "latent_sizes": sorted({"x".join(map(str, s.latent.shape[2:])) for s in samples}),
    }
    return describe(
        title="untitled",
        role=role,
        architecture=architecture(patcher),
        base_model=base_name(patcher),
        base_hash=joint_hash(hashes),
        training=training,
    )


def saved_adapter(adapter: Adapter, title: str, trigger_words: str, thumbnail: torch.Tensor | None) -> Adapter:
    """The adapter with what is known when it is saved added to its metadata."""
    picture = None if thumbnail is None else thumbnail_jpeg(thumbnail)
    metadata = label(adapter.metadata, title=title, trigger_words=trigger_words, thumbnail=picture)
    return replace(adapter, metadata=metadata, name=title)
