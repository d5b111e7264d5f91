"""The vectors that D is made of, for many weights of one shape, and the adapted weights made with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter import Decomposition
from ..bases import Some, decompose_all
from ..decomposition import Basis, spectral_change, spectral_sketch
from ..kronecker import rotate
from .plan import Plan

Side = Tensor | list[Tensor] | None
Bases = Callable[[Mapping[str, Tensor], Decomposition], Iterator[tuple[str, Basis]]]


def decomposed(weights: Mapping[str, Tensor], decomposition: Decomposition) -> Iterator[tuple[str, Basis]]:
    """(name, basis) of every weight, computed where the weights lie."""
    device = next(iter(weights.values())).device
    return decompose_all(weights, decomposition, device=device, keep=True)


def adapted(base: Tensor, basis: Basis | None, delta: Tensor | None, factors: Sequence[Tensor]) -> Tensor:
    """(W0 + D) R^T, for qr R (W0 + D), of `(..., out, in)` weights; delta `(..., k)` in their dtype, 0 where it is not
    live. D in one kernel where it needs no padding, no factors for R = I."""
    if basis is None or delta is None:
        w = base
    elif basis.left is None and basis.right is not None and basis.right.shape == base.shape:
        w = torch.addcmul(base, delta[..., None], basis.right)
    elif basis.left is not None and basis.right is not None:
        product = torch.baddbmm if base.dim() == 3 else torch.addmm
        w = product(base, basis.left * delta[..., None, :], basis.right)
    else:
        w = base + spectral_change(basis, delta, base)
    if not factors:
        return w
    return rotate(w.mT, factors).mT if basis is not None and basis.decomposition == "qr" else rotate(w, factors)


@dataclass
class Vectors:
    """Left and right vectors, by the fast plan one stack `(B, ...)`, else one tensor for each weight, with low VRAM in
    main memory. In the dtype of the adapted weights; spectrum, live `(B, k)` and probes `(B, k, 16)` are stacks on the
    weights' device."""

    decomposition: Decomposition
    left: Side
    right: Side
    spectrum: Tensor
    live: Tensor
    probes: Tensor

    @classmethod
    def of(
        cls, weights: Mapping[str, Tensor], names: Sequence[str], decomposition: Decomposition, dtype: torch.dtype,
        plan: Plan, bases: Bases,
    ) -> Vectors | None:  # fmt: skip
        """Of equal-shaped weights; None for `none`.

        `bases` gives (name, basis) of some weights in any order, on any device, as computed or as kept."""
        if decomposition == "none":
            return None
        device = weights[names[0]].device
        sides: dict[str, Side] = {"left": None, "right": None}
        small: dict[str, dict[str, Tensor]] = {"spectrum": {}, "live": {}, "probes": {}}
        for name, basis in bases(Some(weights, names), decomposition):
            for side in sides:
                vectors = getattr(basis, side)
                if vectors is not None:
                    sides[side] = _put(sides[side], names.index(name), len(names), vectors.to(device, dtype), plan)
            for part, values in small.items():
                values[name] = getattr(basis, part).to(device)
        stacks = {part: torch.stack([values[name] for name in names]) for part, values in small.items()}
        return cls(decomposition, sides["left"], sides["right"], **stacks)

    def all(self) -> Basis:
        """The basis of the stack; by the fast plan."""
        assert not isinstance(self.left, list) and not isinstance(self.right, list)
        return Basis(self.decomposition, self.left, self.right, self.spectrum, self.live)

    def sketches(self, delta: Tensor) -> Tensor:
        """`(B, 8, 8)`, of the D of a delta `(B, k)`, fp32 on the CPU."""
        return spectral_sketch(Basis(self.decomposition, None, None, self.spectrum, self.live, self.probes), delta)

    def one(self, i: int, device: torch.device) -> Basis:
        """The basis of weight i on a device."""
        left, right = (
            None if side is None else side[i].to(device, non_blocking=True) for side in (self.left, self.right)
        )
        return Basis(self.decomposition, left, right, self.spectrum[i], self.live[i])


def _put(side: Side, i: int, count: int, vectors: Tensor, plan: Plan) -> Side:
    """`side` with the vectors of weight i in their place."""
    if plan == "fast":
        stack = vectors.new_empty(count, *vectors.shape) if side is None else side
        stack[i] = vectors
        return stack
    if plan == "low VRAM":
        kept = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=vectors.is_cuda)
        vectors = kept.copy_(vectors)
    held = [vectors] * count if side is None else list(side)
    held[i] = vectors
    return held
