"""Large tensors in main memory on their way to the device that computes with them.

From memory that is not pinned the driver sends with one thread, for which the host waits. ComfyUI pins the weights that
it leaves in main memory; here is pinned, as far as ComfyUI's own bound allows, what is sent in every forward, and what
is sent for the second time, at another strength: that takes as long as to send it a few times. What is mapped would be
copied by it, page by page, so that it gets memory of its own. New memory is filled by all threads before it is pinned:
to pin it, or to copy into it, meets its pages one by one.

All else goes through a little memory that stays pinned, filled by all threads.

They come when they are needed: sent ahead, while ComfyUI copies the next weight from memory that is not pinned, they
hold that copy up, and a change of strength takes 0.1 s longer for SDXL.
"""

from __future__ import annotations

import threading
import weakref
from functools import lru_cache
from itertools import cycle

import torch
from comfy import model_management
from comfy.model_management import cast_to_device, is_device_cpu, is_device_cuda, pin_memory, unpin_memory
from torch import Tensor

from ...decomposition import Basis
from ...precision import CPU

SOURCE = "_soda_source"
PINNED_AT = 2  # times sent
SMALL = 1 << 16  # bytes; pinning is by whole pages, which small tensors share
SLOTS, SLOT = 4, 8 << 20  # bytes


def to_main_memory(there: Tensor) -> Tensor:
    """A copy of a contiguous tensor on a device, to be sent back again and again."""
    held = torch.empty_like(there, device=CPU)
    source = _source(held, held, there.device, PINNED_AT)
    if source is not None:
        held.zero_()
        source.pin()
    return held.copy_(there)


def on_device(held: Tensor, device: torch.device) -> Tensor:
    """What `to_main_memory` gave, on a device."""
    return _sent_again(held, held, device, times=PINNED_AT)


def vectors_on_device(basis: Basis, device: torch.device, again: bool) -> tuple[Tensor | None, Tensor | None]:
    """Left and right of a kept basis on a device, sent as one: they lie one after the other. `again`: they may be sent
    many times more."""
    left, right = basis.left, basis.right
    if left is None or right is None:
        side = right if left is None else left
        assert side is not None, "an outline"
        sent = _vectors(side, side, device, again, basis.mapped)
        return (None, sent) if left is None else (sent, None)
    assert right.storage_offset() == left.storage_offset() + left.numel(), "not a kept basis"
    sent = _vectors(left, left.as_strided((left.numel() + right.numel(),), (1,)), device, again, basis.mapped)
    return sent[: left.numel()].view_as(left), sent[left.numel() :].view_as(right)


def _vectors(holder: Tensor, held: Tensor, device: torch.device, again: bool, mapped: bool) -> Tensor:
    return _sent_again(holder, held, device, mapped=mapped) if again else _sent(held, device)


def _sent_again(holder: Tensor, held: Tensor, device: torch.device, times: int = 0, mapped: bool = False) -> Tensor:
    """Of a `held` that is there as long as `holder` is; `times`: as if it had been sent so often before."""
    source = _source(holder, held, device, times, mapped)
    return _sent(held, device) if source is None else source.sent(device)


def _source(holder: Tensor, held: Tensor, device: torch.device, times: int, mapped: bool = False) -> _Source | None:
    if not _far(held, device):
        return None
    if not hasattr(holder, SOURCE):
        setattr(holder, SOURCE, _Source(held, times, mapped))
    return getattr(holder, SOURCE)


def _sent(held: Tensor, device: torch.device, pinned: bool = False) -> Tensor:
    ring = None if pinned or not _far(held, device) else _ring(device)
    return cast_to_device(held, device, held.dtype) if ring is None else ring.sent(held)


def _far(held: Tensor, device: torch.device) -> bool:
    """Whether it matters from what memory it is sent, and some may be pinned."""
    large = held.nbytes > SMALL and model_management.MAX_PINNED_MEMORY > 0
    return large and is_device_cpu(held.device) and is_device_cuda(device)


class _Source:
    """Where a tensor is sent from."""

    def __init__(self, held: Tensor, times: int, mapped: bool):
        self.held, self.times, self.mapped = held.detach(), times, mapped
        self.pinned = False

    def sent(self, device: torch.device) -> Tensor:
        self.times += 1
        if self.times == PINNED_AT:
            self.pin()
        return _sent(self.held, device, self.pinned)

    def pin(self) -> None:
        """Once: ComfyUI warns each time."""
        try:
            place = self.held.clone() if self.mapped else self.held
        except RuntimeError:  # no memory is left; the mapped file still is
            return
        self.pinned = pin_memory(place)
        if self.pinned:
            self.held = place
            weakref.finalize(self, unpin_memory, place).atexit = False


class _Ring:
    """Pinned memory that is sent while more of it is filled."""

    def __init__(self, device: torch.device):
        self.device = device
        with torch.inference_mode(False):
            slots = torch.empty(SLOTS, SLOT, dtype=torch.uint8, pin_memory=True)
        self.slots = cycle([(slot, torch.cuda.Event()) for slot in slots])
        self.lock = threading.Lock()

    def sent(self, held: Tensor) -> Tensor:
        """A copy on the device, in the order of its current stream."""
        copy = torch.empty_like(held, device=self.device)
        numbers, there = (tensor.view(-1).view(torch.uint8) for tensor in (held, copy))
        with self.lock, torch.cuda.device(self.device):
            for some, place in zip(numbers.split(SLOT), there.split(SLOT), strict=True):
                slot, free = next(self.slots)
                free.synchronize()
                place.copy_(slot[: len(some)].copy_(some), non_blocking=True)
                free.record()
        return copy


@lru_cache(maxsize=8)
def _ring(device: torch.device) -> _Ring | None:
    """None where no memory can be pinned."""
    try:
        return _Ring(device)
    except RuntimeError:
        return None
