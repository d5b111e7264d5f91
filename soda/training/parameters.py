"""The trainable numbers of an adapter, batched: a few kernels for all weights of one shape.

For every weight of shape (out, in): W = (W0 + D(delta)) (R_1 x ... x R_r)^T with delta = 0 and R_j = I at the start,
which gives W0 bit for bit. The factors R_j themselves are the parameters, in banks `(B, n, n)` of one size n over the
whole model, for `StiefelAdam`; the deltas of one shape are one `(B, k)` parameter. `svd` trains with
max(sigma + delta, 0) and stores delta held at >= -sigma. Without rotation the factors stay at I and only the spectrum
is trained (for `svd` that is SVDiff, arXiv 2303.11305); the adapter's form and what it mixes with are the same.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..adapter import Decomposition, Layer
from ..errors import SodaTrainingError
from ..kronecker import MAX_FACTORS, factor_sizes, log_rotation, triangle
from .layerwise import LayerByLayer
from .plan import Plan
from .vectors import Bases, Vectors, adapted, decomposed

Factors = int | Mapping[int, Sequence[int]]


class ShapeGroup(nn.Module):
    """All weights of one shape `(out, in)`: their vectors, fp32 deltas, and places of their factors.

    base: their stack `(B, out, in)` in the dtype of the adapted weights, by the fast plan alone. places: the bank of
    each factor, and its rows there; none without rotation.
    """

    base: Tensor | None

    def __init__(
        self, weights: Mapping[str, Tensor], names: Sequence[str], decomposition: Decomposition, factors: Factors,
        dtype: torch.dtype, plan: Plan, text: bool, bases: Bases,
    ):  # fmt: skip
        super().__init__()
        self.names, self.decomposition, self.dtype, self.text = list(names), decomposition, dtype, text
        one = weights[self.names[0]]
        self.shape, self.device = one.shape, one.device
        base = None
        if plan == "fast":
            base = torch.empty(len(self.names), *self.shape, dtype=dtype, device=self.device)
            for i, name in enumerate(self.names):
                base[i] = weights[name].detach()
        self.register_buffer("base", base, persistent=False)
        self.sizes = _sizes(self.shape[0 if decomposition == "qr" else 1], factors)
        self.places: list[tuple[str, slice]] = []
        self.vectors = Vectors.of(weights, self.names, decomposition, dtype, plan, bases)
        self.delta = None if self.vectors is None else nn.Parameter(torch.zeros_like(self.vectors.spectrum))

    def held_delta(self) -> Tensor:
        """delta `(B, k)`, for svd at no less than -sigma, and 0 where the spectrum is not live."""
        assert self.delta is not None and self.vectors is not None
        spectrum, live = self.vectors.spectrum, self.vectors.live
        delta = torch.maximum(self.delta, -spectrum) if self.decomposition == "svd" else self.delta
        return torch.where(live, delta, 0.0)

    def forward(self, factors: list[Tensor]) -> Tensor:
        """The adapted weights `(B, out, in)` with factors `(B, n_j, n_j)`, none for R = I; by the fast plan."""
        assert self.base is not None
        if self.vectors is None:
            return adapted(self.base, None, None, factors)
        return adapted(self.base, self.vectors.all(), self.held_delta().to(self.dtype), factors)

    def sketches(self) -> list[Tensor]:
        """The sketch of every weight's D."""
        assert self.vectors is not None
        return list(self.vectors.sketches(self.held_delta()))


def _sizes(dimension: int, factors: Factors) -> tuple[int, ...]:
    if isinstance(factors, int):
        return factor_sizes(dimension, factors)
    sizes = tuple(factors.get(dimension, ()))
    if math.prod(sizes) != dimension or not 1 <= len(sizes) <= MAX_FACTORS or min(sizes) < 1:
        raise SodaTrainingError(
            f"the factor sizes {sizes} do not turn {dimension} dimensions; give 1 to {MAX_FACTORS} with that product"
        )
    return sizes


class SodaParameters(nn.Module):
    """Parameters for `weights`, a mapping of layer names to `(out, in)` tensors, which are not modified.

    `factors` is their number, for sizes by the rule of `factor_sizes`, or the sizes of each rotated dimension. The
    adapted weights are made in `dtype`, that in which the model computes; factors and deltas are fp32 always. `text`
    are the names of those that are a text encoder's: theirs are made in fp32, in which text encoders compute, and have
    banks and deltas of their own, for a rate of their own. `weights` may load a weight anew at every look; all plans
    but the fast one look whenever they make an adapted weight. The parameters are the same by every plan, so that a
    run's state goes from one to another. `bases` finds the bases of weights, where they need not be computed.
    Raises SodaTrainingError if there is nothing to train or the sizes do not fit.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        decomposition: Decomposition = "lq",
        factors: Factors = 3,
        rotation: bool = True,
        dtype: torch.dtype = torch.float32,
        plan: Plan = "fast",
        text: Container[str] = (),
        bases: Bases = decomposed,
    ):
        super().__init__()
        if decomposition == "none" and not rotation:
            raise SodaTrainingError("without a decomposition and without a rotation there is nothing to train")
        if not weights:
            raise SodaTrainingError("there is no weight to adapt; choose a model with attention layers")
        alike: dict[tuple[bool, tuple[int, ...]], list[str]] = {}
        for name, weight in weights.items():
            if weight.dim() != 2 or not weight.numel() or not weight.isfinite().all():
                raise SodaTrainingError(
                    f"the weight {name!r} of shape {tuple(weight.shape)} is no matrix of finite numbers; load another "
                    "model or leave this layer out"
                )
            alike.setdefault((name in text, tuple(weight.shape)), []).append(name)
        groups = nn.ModuleList(
            ShapeGroup(
                weights, names, decomposition, factors, torch.float32 if of_text else dtype, plan, of_text, bases
            )
            for (of_text, _), names in alike.items()
        )
        self.weights, self.plan = weights, plan
        self.groups = cast(Sequence[ShapeGroup], groups)
        counts: dict[str, int] = {}
        starts: dict[str, Tensor] = {}
        for group in self.groups if rotation else ():
            for n in group.sizes:
                bank = f"text_{n}" if group.text else str(n)
                start = counts.get(bank, 0)
                counts[bank] = start + len(group.names)
                starts[bank] = torch.eye(n, device=group.device)
                group.places.append((bank, slice(start, counts[bank])))
        self.banks = nn.ParameterDict({bank: nn.Parameter(starts[bank].repeat(c, 1, 1)) for bank, c in counts.items()})

    def rotations(self) -> list[nn.Parameter]:
        """The banks `(B, n, n)` of factors, for StiefelAdam; empty without rotation."""
        return list(self.banks.values())

    def spectra(self) -> list[nn.Parameter]:
        """The deltas `(B, k)`, for a Euclidean optimizer; empty for `none`."""
        return [group.delta for group in self.groups if group.delta is not None]

    def of_text_encoder(self) -> list[nn.Parameter]:
        """Those of all these that belong to a text encoder's weights."""
        groups = [group for group in self.groups if group.text]
        banks = dict.fromkeys(bank for group in groups for bank, _ in group.places)
        return [self.banks[bank] for bank in banks] + [group.delta for group in groups if group.delta is not None]

    def _factors(self, group: ShapeGroup) -> list[Tensor]:
        return [self.banks[bank][rows] for bank, rows in group.places]

    def forward(self) -> Mapping[str, Tensor]:
        """All adapted weights by layer name, differentiable in factors and deltas.

        But for the fast plan each is made when it is looked at, and follows the parameters until the next step."""
        if self.plan != "fast":
            return LayerByLayer(self.weights, self.groups, dict(self.banks.items()))
        found: dict[str, Tensor] = {}
        for group in self.groups:
            found.update(zip(group.names, group(self._factors(group)).unbind(), strict=True))
        return found

    def base_weights(self) -> Mapping[str, Tensor]:
        """What is adapted, as it is without."""
        if self.plan != "fast":
            return self.weights
        return {
            name: weight
            for group in self.groups
            if group.base is not None
            for name, weight in zip(group.names, group.base.unbind(), strict=True)
        }

    @torch.no_grad()
    def snapshot(self) -> Mapping[str, Tensor]:
        """The adapted weights as they are now, whatever becomes of the parameters."""
        if self.plan != "fast":
            return LayerByLayer(self.weights, self.groups, {n: bank.clone() for n, bank in self.banks.items()})
        return {name: weight.clone() for name, weight in self().items()}

    @torch.no_grad()
    def layers(self) -> dict[str, tuple[Layer, ...]]:
        """The adapter's layers as they stand, fp32 on the CPU, with the sketches of D on this base."""
        layers: dict[str, tuple[Layer, ...]] = {}
        for group in self.groups:
            logs = [triangle(log_rotation(factor)).float().cpu() for factor in self._factors(group)]
            logs = logs or [torch.zeros(len(group.names), n * (n - 1) // 2) for n in group.sizes]
            spectra = None if group.delta is None else (group.held_delta().cpu(), group.sketches())
            for i, name in enumerate(group.names):
                delta, drawn = (None, None) if spectra is None else (spectra[0][i].clone(), spectra[1][i])
                layer = Layer(group.decomposition, delta, tuple(log[i].clone() for log in logs), drawn)
                layers[name] = (layer,)
        return layers
