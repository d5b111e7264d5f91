"""Vectors of bases on their way to the device that computes with them.

ComfyUI pins the weights that it leaves in main memory and, with dynamic VRAM, what patches carry; without dynamic VRAM
patches see to themselves. A basis is as large as its weight: copied in every forward from memory that is not pinned,
it would take several times as long, and the host would wait for it.
"""

from __future__ import annotations

import weakref

import torch
from comfy.model_management import cast_to_device, is_device_cpu, is_device_cuda, pin_memory, unpin_memory
from torch import Tensor


def on_device(vectors: Tensor, device: torch.device, often: bool) -> Tensor:
    """The vectors on a device, in their dtype.

    Those needed `often` are pinned where they lie, as far as ComfyUI's own bound allows, until nobody holds them.
    """
    if often and is_device_cpu(vectors.device) and is_device_cuda(device) and pin_memory(vectors):
        weakref.finalize(vectors, unpin_memory, vectors.detach()).atexit = False
    return cast_to_device(vectors, device, vectors.dtype)
