"""Large tensors in main memory on their way to the device that computes with them.

ComfyUI pins the weights that it leaves in main memory; bases are as large. From memory that is not pinned they would
take several times as long, and the host would wait for them. Pinning takes about as long as one such copy: worth it for
what is sent again, at another strength or in the next forward. Only for devices that ComfyUI pins for, and as far as
its own bound allows.

Where the device waits for ComfyUI between two weights, what is pinned can come meanwhile (`Ahead`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import lru_cache

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


class Ahead:
    """Pinned tensors that are sent to a CUDA device before they are asked for, on a stream of their own."""

    def __init__(self) -> None:
        self._sent: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []  # as held, as sent, when it is there

    def send(self, held: Iterable[Tensor], device: torch.device) -> None:
        """Begin; what was sent before and not taken is let go."""
        held = [tensor for tensor in held if getattr(tensor, TIMES, 0) == 2 and tensor.is_pinned()]
        self._sent = []
        if held:
            stream = _stream(device)
            with torch.cuda.stream(stream):
                sent = [tensor.to(device, non_blocking=True) for tensor in held]
            there = stream.record_event()
            self._sent = [(tensor, copy, there) for tensor, copy in zip(held, sent, strict=True)]

    def take(self, held: Tensor, device: torch.device, pinned: bool | None) -> Tensor:
        """The tensor on the device, sent now, as `on_device` does, if it was not before."""
        for tensor, copy, there in self._sent:
            if tensor is held and copy.device == device:
                stream = torch.cuda.current_stream(device)
                stream.wait_event(there)
                copy.record_stream(stream)
                return copy
        return on_device(held, device, pinned)


@lru_cache(maxsize=8)
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
