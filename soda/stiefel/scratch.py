"""Memory that outlives a step: on a CPU, page faults on fresh megabytes cost a third of the arithmetic in them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """Two pieces of memory per dtype and device, as large as the largest request; a piece serves one use at a time."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def take(self, piece: int, like: Tensor, *shape: int) -> Tensor:
        """Piece 0 or 1, uninitialised, as a contiguous tensor of `shape` with the dtype and device of `like`."""
        key, count = (piece, like.dtype, like.device), math.prod(shape)
        held = self._pieces.get(key)
        if held is None or held.numel() < count:
            held = self._pieces[key] = like.new_empty(count)
        return held[:count].view(shape)
