"""Adapted weights: W = R_out (W0 + sum D) R_in^T from a weight, its bases and the terms of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .adapter import Decomposition, Layer
from .decomposition import Basis, spectral_change
from .errors import SodaMixError
from .kronecker import expm_factors, kronecker_sum, rotate
from .precision import CPU


def adapt(weight: Tensor, layers: Sequence[Layer], bases: Mapping[Decomposition, Basis]) -> Tensor:
    """The adapted weight `(out, in)`, fp32 (fp64 for an fp64 weight), on the weight's device.

    lq, svd and none turn the input side, qr the output side. Terms of equal factor sizes on a side add their
    logarithms, which keeps R a Kronecker product; unlike sizes have no common small form and go through the dense
    exp(sum log R_i). If no term changes anything, the weight itself is returned, bit for bit.
    Raises SodaMixError if a term's spectrum or dimension is not the weight's.
    """
    terms = [layer for layer in layers if not layer.is_zero()]
    if not terms:
        return weight
    w = weight if weight.dtype == torch.float64 else weight.float()
    adapted = w
    for term in terms:
        if term.delta is not None and term.delta.count_nonzero():
            if term.delta.numel() != min(w.shape):
                raise SodaMixError(f"a spectrum of {term.delta.numel()} numbers does not fit a weight {tuple(w.shape)}")
            adapted = adapted + spectral_change(bases[term.decomposition], term.delta.to(w), w)
    for side, dimension in (("input", w.shape[1]), ("output", w.shape[0])):
        turning = [term for term in terms if term.side == side]
        for term in turning:
            if term.dimension != dimension:
                raise SodaMixError(
                    f"factor sizes {term.sizes} turn {term.dimension} {side}s, but the weight has {tuple(w.shape)}"
                )
        factors = _factors(turning, w)
        if factors:
            adapted = rotate(adapted, factors) if side == "input" else rotate(adapted.mT, factors).mT
    return adapted


def _factors(terms: Sequence[Layer], like: Tensor) -> list[Tensor]:
    """R of the terms as Kronecker factors, or as one dense matrix where their sizes differ; [] for the identity.

    The small exponentials run in fp64 on the CPU: fewer launches, and not every device has fp64.
    """
    sums: dict[tuple[int, ...], list[Tensor]] = {}
    for term in terms:
        logs = [log.to(CPU, torch.float64) for log in term.logs]
        known = sums.get(term.sizes)
        sums[term.sizes] = logs if known is None else [a + b for a, b in zip(known, logs, strict=True)]
    sums = {sizes: logs for sizes, logs in sums.items() if any(log.count_nonzero() for log in logs)}
    if len(sums) > 1:
        total = torch.stack([kronecker_sum(logs, sizes) for sizes, logs in sorted(sums.items())]).sum(0)
        return [torch.linalg.matrix_exp(total.to(like.device if like.is_cuda else CPU)).to(like)]
    return [f.to(like) for sizes, logs in sums.items() for f in expm_factors(logs, sizes)]
