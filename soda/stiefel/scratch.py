"""Memory that outlives a step: on a CPU, page faults on fresh megabytes cost a third of the arithmetic in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 64  # numbers


class Scratch:
    """Pieces of memory per dtype and device, as large as the largest request; a piece serves one use at a time."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._parts: dict[tuple, list[Tensor]] = {}
        self._eyes: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def take(self, piece: int, like: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Piece 0, 1 or 2 as contiguous tensors of `shapes`, uninitialised, with the dtype and device of `like`."""
        key = piece, like.dtype, like.device
        asked = key, tuple(map(tuple, shapes))
        if asked not in self._parts:
            counts = [math.prod(shape) for shape in shapes]
            rooms = [-(-count // ALIGNED) * ALIGNED for count in counts]
            if key not in self._pieces or self._pieces[key].numel() < sum(rooms):
                self._pieces[key] = like.new_empty(sum(rooms))
                self._parts = {old: parts for old, parts in self._parts.items() if old[0] != key}
            parts = self._pieces[key][: sum(rooms)].split(rooms)
            self._parts[asked] = [p[:count].view(shape) for p, count, shape in zip(parts, counts, shapes, strict=True)]
        return list(self._parts[asked])

    def eye(self, like: Tensor) -> Tensor:
        """I of as many columns as `like` has, in its dtype on its device; not to be written to."""
        key = like.shape[-1], like.dtype, like.device
        if key not in self._eyes:
            self._eyes[key] = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
        return self._eyes[key]
