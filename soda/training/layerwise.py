"""Adapted weights made one by one, where a model uses them, and held by nobody."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .vectors import adapted

if TYPE_CHECKING:
    from .parameters import ShapeGroup


class LayerByLayer(Mapping[str, Tensor]):
    """Layer name -> adapted weight, made at every look, differentiable in the banks of factors and the deltas.

    `weights` are the base weights. Banks and deltas are taken apart once, so that their gradients are put together
    once however many layers there are.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], groups: Sequence[ShapeGroup], banks: Mapping[str, Tensor]
    ):  # fmt: skip
        self.weights = weights
        self.places = {name: (group, i) for group in groups for i, name in enumerate(group.names)}
        self.factors = {name: bank.unbind() for name, bank in banks.items()}
        self.deltas = {
            group: group.held_delta().to(group.dtype).unbind() for group in groups if group.delta is not None
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.on(name, self.weights[name])

    def on(self, name: str, base: Tensor) -> Tensor:
        """The adapted weight of a layer whose base weight `(out, in)` is at hand: it spares a look."""
        group, i = self.places[name]
        base = base.to(group.dtype)
        factors = [self.factors[bank][rows.start + i] for bank, rows in group.places]
        if group.vectors is None:
            return adapted(base, None, None, factors)
        return adapted(base, group.vectors.one(i, base.device), self.deltas[group][i], factors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
