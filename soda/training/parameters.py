"""The trainable numbers of an adapter, batched: a few kernels for all weights of one shape.

For every weight of shape (out, in): W = (W0 + D(delta)) (R_1 x ... x R_r)^T with delta = 0 and R_j = I at the start,
which gives W0 bit for bit. The factors R_j themselves are the parameters, in banks `(B, n, n)` of one size n over the
whole model, for `StiefelAdam`; the deltas of one shape are one `(B, k)` parameter. `svd` trains with
max(sigma + delta, 0) and stores delta held at >= -sigma. Without rotation the factors stay at I and only the spectrum
is trained (for `svd` that is SVDiff, arXiv 2303.11305); the adapter's form and what it mixes with are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..adapter import Decomposition, Layer
from ..bases import decompose_all
from ..decomposition import Basis, complete, spectral_change
from ..errors import SodaTrainingError
from ..fingerprint import sketch
from ..kronecker import MAX_FACTORS, factor_sizes, log_rotation, rotate, triangle

Factors = int | Mapping[int, Sequence[int]]


class ShapeGroup(nn.Module):
    """All weights of one shape: their base `(B, out, in)` and its basis in the dtype of the weights, fp32 deltas, and
    places of their factors."""

    base: Tensor
    left: Tensor | None
    right: Tensor | None
    spectrum: Tensor
    live: Tensor

    def __init__(
        self, weights: Mapping[str, Tensor], decomposition: Decomposition, factors: Factors, dtype: torch.dtype
    ):
        super().__init__()
        self.names, self.decomposition = list(weights), decomposition
        self.register_buffer("base", torch.stack([w.detach().to(dtype) for w in weights.values()]), persistent=False)
        self.sizes = _sizes(self.base.shape[1 if decomposition == "qr" else 2], factors)
        self.rows: list[slice] = []  # of factor j in the bank of size n_j
        self.delta: nn.Parameter | None = None
        basis = _basis(weights, decomposition, self.base)
        if basis is not None:
            for part in ("left", "right"):
                vectors = getattr(basis, part)
                self.register_buffer(part, None if vectors is None else vectors.to(dtype), persistent=False)
            for part in ("spectrum", "live"):
                self.register_buffer(part, getattr(basis, part), persistent=False)
            self.delta = nn.Parameter(torch.zeros_like(basis.spectrum))

    def basis(self) -> Basis:
        """The basis of the base, `(B, ...)`; there is none for `none`."""
        return Basis(self.decomposition, self.left, self.right, self.spectrum, self.live)

    def held_delta(self) -> Tensor:
        """delta `(B, k)`, for svd at no less than -sigma, and 0 where the spectrum is not live."""
        assert self.delta is not None
        delta = torch.maximum(self.delta, -self.spectrum) if self.decomposition == "svd" else self.delta
        return torch.where(self.live, delta, 0.0)

    def change(self) -> Tensor:
        """D `(B, out, in)`."""
        return spectral_change(self.basis(), self.held_delta().to(self.base.dtype), self.base)

    def changed(self) -> Tensor:
        """W0 + D, in one kernel where D needs no padding."""
        if self.delta is None:
            return self.base
        delta = self.held_delta().to(self.base.dtype)
        if self.left is None and self.right is not None and self.right.shape == self.base.shape:
            return torch.addcmul(self.base, delta[..., None], self.right)
        if self.left is not None and self.right is not None:
            return torch.baddbmm(self.base, self.left * delta[..., None, :], self.right)
        return self.base + self.change()

    def forward(self, factors: list[Tensor]) -> Tensor:
        """The adapted weights `(B, out, in)` with factors `(B, n_j, n_j)`, none for R = I."""
        w = self.changed()
        if not factors:
            return w
        return rotate(w.mT, factors).mT if self.decomposition == "qr" else rotate(w, factors)


def _sizes(dimension: int, factors: Factors) -> tuple[int, ...]:
    if isinstance(factors, int):
        return factor_sizes(dimension, factors)
    sizes = tuple(factors.get(dimension, ()))
    if math.prod(sizes) != dimension or not 1 <= len(sizes) <= MAX_FACTORS or min(sizes) < 1:
        raise SodaTrainingError(
            f"the factor sizes {sizes} do not turn {dimension} dimensions; give 1 to {MAX_FACTORS} with that product"
        )
    return sizes


def _basis(weights: Mapping[str, Tensor], decomposition: Decomposition, base: Tensor) -> Basis | None:
    """The basis of equal-shaped weights on the device of their stack, with both sides: each step needs them."""
    bases = [basis.tensors() for _, basis in decompose_all(weights, decomposition, device=base.device)]
    if not bases:
        return None
    parts = {part: torch.stack([b[part] for b in bases]).to(base.device) for part in bases[0]}
    return complete(Basis.of(decomposition, parts), base)


class SodaParameters(nn.Module):
    """Parameters for `weights`, a mapping of layer names to `(out, in)` tensors, which are not modified.

    `factors` is their number, for sizes by the rule of `factor_sizes`, or the sizes of each rotated dimension. The
    adapted weights are made in `dtype`, that in which the model computes; factors and deltas are fp32 always.
    Raises SodaTrainingError if there is nothing to train or the sizes do not fit.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        decomposition: Decomposition = "lq",
        factors: Factors = 3,
        rotation: bool = True,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if decomposition == "none" and not rotation:
            raise SodaTrainingError("without a decomposition and without a rotation there is nothing to train")
        if not weights:
            raise SodaTrainingError("there is no weight to adapt; choose a model with attention layers")
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for name, weight in weights.items():
            if weight.dim() != 2 or not weight.numel() or not weight.isfinite().all():
                raise SodaTrainingError(
                    f"the weight {name!r} of shape {tuple(weight.shape)} is no matrix of finite numbers; load another "
                    "model or leave this layer out"
                )
            by_shape.setdefault(tuple(weight.shape), []).append(name)
        groups = nn.ModuleList(
            ShapeGroup({name: weights[name] for name in names}, decomposition, factors, dtype)
            for names in by_shape.values()
        )
        self.groups = cast(Sequence[ShapeGroup], groups)
        counts: dict[int, int] = {}
        for group in self.groups if rotation else ():
            for n in group.sizes:
                start = counts.get(n, 0)
                counts[n] = start + len(group.names)
                group.rows.append(slice(start, counts[n]))
        device = self.groups[0].base.device
        self.banks = nn.ParameterDict(
            {str(n): nn.Parameter(torch.eye(n, device=device).repeat(count, 1, 1)) for n, count in counts.items()}
        )

    def rotations(self) -> list[nn.Parameter]:
        """The banks `(B, n, n)` of factors, for StiefelAdam; empty without rotation."""
        return list(self.banks.values())

    def spectra(self) -> list[nn.Parameter]:
        """The deltas `(B, k)`, for a Euclidean optimizer; empty for `none`."""
        return [group.delta for group in self.groups if group.delta is not None]

    def _factors(self, group: ShapeGroup) -> list[Tensor]:
        return [self.banks[str(n)][rows] for n, rows in zip(group.sizes, group.rows, strict=False)]

    def forward(self) -> dict[str, Tensor]:
        """All adapted weights by layer name, differentiable in factors and deltas."""
        adapted: dict[str, Tensor] = {}
        for group in self.groups:
            adapted.update(zip(group.names, group(self._factors(group)).unbind(), strict=True))
        return adapted

    @torch.no_grad()
    def layers(self) -> dict[str, tuple[Layer, ...]]:
        """The adapter's layers as they stand, fp32 on the CPU, with the sketches of D on this base."""
        layers: dict[str, tuple[Layer, ...]] = {}
        for group in self.groups:
            logs = [triangle(log_rotation(factor)).float().cpu() for factor in self._factors(group)]
            logs = logs or [torch.zeros(len(group.names), n * (n - 1) // 2) for n in group.sizes]
            spectra = None if group.delta is None else (group.held_delta().cpu(), sketch(group.change()))
            for i, name in enumerate(group.names):
                delta, drawn = (None, None) if spectra is None else (spectra[0][i].clone(), spectra[1][i])
                layer = Layer(group.decomposition, delta, tuple(log[i].clone() for log in logs), drawn)
                layers[name] = (layer,)
        return layers
