"""Memory that outlives a step: on a CPU, page faults on fresh megabytes cost a third of the arithmetic in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 64  # numbers


class Scratch:
    """Two pieces of memory per dtype and device, as large as the largest request; a piece serves one use at a time."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def take(self, piece: int, like: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Piece 0 or 1 as contiguous tensors of `shapes`, uninitialised, with the dtype and device of `like`."""
        counts = [math.prod(shape) for shape in shapes]
        rooms = [-(-count // ALIGNED) * ALIGNED for count in counts]
        key, total = (piece, like.dtype, like.device), sum(rooms)
        held = self._pieces.get(key)
        if held is None or held.numel() < total:
            held = self._pieces[key] = like.new_empty(total)
        parts = held[:total].split(rooms)
        return [part[:count].view(shape) for part, count, shape in zip(parts, counts, shapes, strict=True)]
