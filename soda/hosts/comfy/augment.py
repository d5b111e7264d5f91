"""Varied views of training images: mirrored, cropped a little, in other colours; on the GPU, before training.

Each view is encoded once. A subject with a left and a right, or a style that lives by its colours, should not be
varied in these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import comfy.model_management
import kornia
import torch

from ...errors import SodaTrainingError
from .dataset import Sample

HUE = 0.25  # of the colour jitter, in half turns; a hue is noticed before a brightness


@dataclass(frozen=True)
class Augment:
    """views: of every image, the image itself included. flip: mirror every second one by chance. crop: largest share
    of a side that is cut off. colour: largest relative change of brightness, contrast and saturation."""

    views: int = 4
    flip: bool = True
    crop: float = 0.1
    colour: float = 0.0

    def __post_init__(self) -> None:
        for name, least, most in (("views", 1, 64), ("crop", 0, 0.5), ("colour", 0, 0.9)):
            if not least <= getattr(self, name) <= most:
                raise SodaTrainingError(f"{name} is {getattr(self, name)}; give {least} to {most}")


def view(images: torch.Tensor, augment: Augment, generator: torch.Generator) -> torch.Tensor:
    """One varied view of `(B, H, W, 3)` images in 0 to 1, each varied by itself; of the same size."""
    count, height, width, _ = images.shape

    def draw() -> torch.Tensor:
        return torch.rand(count, generator=generator)

    x = images.movedim(-1, 1).to(comfy.model_management.get_torch_device(), torch.float32)
    mirrored, cut, left, top = draw() < 0.5, draw() * augment.crop, draw(), draw()
    shades = [1 + augment.colour * (2 * draw() - 1) for _ in range(3)]
    hue = augment.colour * HUE * (2 * draw() - 1)
    if augment.flip:
        x = torch.where(mirrored.to(x.device).view(-1, 1, 1, 1), kornia.geometry.hflip(x), x)
    if augment.crop:
        sides = torch.tensor([width - 1.0, height - 1.0])
        start = torch.stack([left, top], -1) * cut[:, None] * sides
        size = (1 - cut)[:, None] * sides
        corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        boxes = start[:, None] + corners * size[:, None]
        x = kornia.geometry.crop_and_resize(x, boxes.to(x.device), (height, width))
    if augment.colour:
        brightness, contrast, saturation = (s.to(x.device).view(-1, 1, 1, 1) for s in shades)
        x = (x * brightness).clamp(0, 1)
        x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast).clamp(0, 1)
        x = kornia.enhance.adjust_saturation(x, saturation.flatten())
        x = kornia.enhance.adjust_hue(x, hue.to(x.device) * torch.pi)
    return x.clamp(0, 1).movedim(1, -1).to(images)


def views(samples: Sequence[Sample], images: Sequence[torch.Tensor], vae, augment: Augment, seed: int) -> list[Sample]:
    """`samples`, which are those of `images` encoded as they are, with all further views of each."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    pictures = [image[None, :, :, :3] for batch in images for image in batch]
    found = list(samples)
    for _ in range(augment.views - 1):
        for sample, picture in zip(samples, pictures, strict=True):
            latent = vae.encode(view(picture, augment, generator))
            found.append(replace(sample, latent=latent.clone()))
    return found
