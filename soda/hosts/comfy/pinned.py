"""Large tensors in main memory on their way to the device that computes with them.

ComfyUI pins the weights that it leaves in main memory; bases are as large. From memory that is not pinned they would
take several times as long, and the host would wait for them. Pinning takes about as long as one such copy: worth it for
what is sent again, at another strength or in the next forward. Only for devices that ComfyUI pins for, and as far as
its own bound allows.

They come when they are needed: sent ahead, while ComfyUI copies the next weight from memory that is not pinned, they
hold that copy up, and a change of strength takes 0.1 s longer for SDXL.
"""

from __future__ import annotations

import weakref

import torch
from comfy.model_management import cast_to_device, is_device_cpu, is_device_cuda, pin_memory, unpin_memory
from torch import Tensor

TIMES = "_soda_times"  # that it was sent: 0, 1, or more, after which pinning was tried
SMALL = 1 << 16  # bytes; pinning is by whole pages, which small tensors share


def on_device(held: Tensor, device: torch.device, pinned: bool | None = None) -> Tensor:
    """The tensor on a device, in its dtype. `pinned` where it lies until nobody holds it: now, not for this one, or
    (None) when it is sent for the second time."""
    times = getattr(held, TIMES, 0)
    if pinned is not False and times < 2 and is_device_cpu(held.device) and is_device_cuda(device):
        now = pinned or times == 1
        if now and held.nbytes > SMALL and pin_memory(held):
            weakref.finalize(held, unpin_memory, held.detach()).atexit = False
        setattr(held, TIMES, 2 if now else 1)  # what cannot be pinned now is not tried again: ComfyUI warns each time
    return cast_to_device(held, device, held.dtype)
