"""Latents of several parts (a video and its sound, a shape and its camera), packed as ComfyUI's samplers pack them.

A packed latent is (1, 1, N), all numbers of its parts in a row; a latent of one part stays as it is. Which it is, its
`shapes` say: one for each part, batch included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.nested_tensor
import comfy.utils
import torch

Shapes = tuple[tuple[int, ...], ...]


def split(samples: Any) -> list[tuple[torch.Tensor, Shapes]]:
    """Of the `samples` of a LATENT each one, packed, with its shapes."""
    parts = samples.unbind() if getattr(samples, "is_nested", False) else [samples]
    rows = [[part[row : row + 1] for part in parts] for row in range(len(parts[0]))]
    return [(_packed(row), tuple(tuple(part.shape) for part in row)) for row in rows]


def tell(model: Any, shapes: Shapes) -> list[torch.Size]:
    """A BaseModel what the numbers of packed latents belong to, as samplers of newer ComfyUIs do; the shapes."""
    model.latent_shapes = [torch.Size(shape) for shape in shapes]
    return model.latent_shapes


def empty(shapes: Shapes) -> Any:
    """Zeros in these shapes, as a LATENT holds them."""
    parts = [torch.zeros(shape) for shape in shapes]
    return parts[0] if len(parts) == 1 else comfy.nested_tensor.NestedTensor(parts)


def first(samples: Any) -> torch.Tensor:
    """The part that a VAE decodes to a picture."""
    return samples.unbind()[0] if getattr(samples, "is_nested", False) else samples


def shared_noise(shapes: Shapes, count: int, generator: torch.Generator) -> torch.Tensor:
    """One number for each channel of each part, everywhere in it; `count` latents, packed."""
    return _packed([
        torch.randn(count, shape[1], *(1 for _ in shape[2:]), generator=generator).expand(count, *shape[1:])
        for shape in shapes
    ])  # fmt: skip


def _packed(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else comfy.utils.pack_latents(parts)[0]
