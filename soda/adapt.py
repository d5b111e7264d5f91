"""Adapted weights: W = R_out (W0 + sum D) R_in^T from a weight, its bases and the terms of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .adapter import Decomposition, Layer
from .compressed import Compressed
from .decomposition import Basis, add_spectral_change, scaled_products
from .errors import SodaMixError
from .rotation import Logarithms, Rotations


class Spectrum(NamedTuple):
    """One D: the vectors of its basis, and delta, 0 where the basis is not live; on the weight's device."""

    left: Tensor | None
    right: Tensor | None
    delta: Tensor


def adapt(weight: Tensor, layers: Sequence[Layer], bases: Mapping[Decomposition, Basis]) -> Tensor:
    """W = R_out (W0 + sum D) R_in^T `(out, in)`, fp32 (fp64 for an fp64 weight), on the weight's device.

    weight: W0. bases: `decompose(weight, ...)` by decomposition, for terms with a delta, on the weight's device.
    lq, svd and none turn the input side, qr the output side. Terms of equal factor sizes on a side add their
    logarithms, which keeps R a Kronecker product; unlike sizes have no common small form and go through the dense
    exp(sum log R_i). If no term changes anything, the weight itself is returned, bit for bit.
    Raises SodaMixError if a term's spectrum or dimension is not the weight's, or its basis is not there.
    """
    terms = [layer for layer in layers if not layer.is_zero()]
    if not terms:
        return weight
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    spectra = []
    for term in terms:
        width = weight.shape[0] if term.side == "output" else weight.shape[1]
        if term.dimension != width:
            raise SodaMixError(
                f"factor sizes {term.sizes} turn {term.dimension} {term.side}s, but the weight has "
                f"{tuple(weight.shape)}"
            )
        if term.delta is None or not term.delta.count_nonzero():
            continue
        if term.delta.numel() != min(weight.shape):
            raise SodaMixError(
                f"a spectrum of {term.delta.numel()} numbers does not fit a weight {tuple(weight.shape)}"
            )
        if term.decomposition not in bases:
            raise SodaMixError(
                f"there is no {term.decomposition} basis of the weight; give soda.decompose(weight, "
                f"{term.decomposition!r}) with the bases"
            )
        basis = bases[term.decomposition]
        delta = torch.where(basis.live, term.delta.to(basis.live.device), 0.0).to(weight.device, dtype)
        spectra.append(Spectrum(basis.left, basis.right, delta))
    return changed(weight, spectra, Logarithms.of({"": terms}, weight.device).rotations(dtype=dtype)[""])


def compressed_change(spectra: Sequence[Spectrum], weight: Tensor, dtype: torch.dtype) -> Compressed:
    """The sum of their D for a `weight` (out, in), on its device, in the integers `dtype`."""
    if len(spectra) == 1 and spectra[0].right is not None:
        return compressed_changes(spectra, dtype)[0]
    total = torch.zeros(weight.shape, device=weight.device)
    for spectrum in spectra:
        add_spectral_change(total, *spectrum)
    return Compressed.each(total[None], dtype)[0]


def compressed_changes(spectra: Sequence[Spectrum], dtype: torch.dtype) -> list[Compressed]:
    """`compressed_change` of each of some weights of one shape with one D each, of lq all or all of svd: to the last
    bit as alone, by hardly more launches than for one."""

    def stacked(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(parts)) if len(parts) > 1 else parts[0][None]

    lefts = [spectrum.left for spectrum in spectra if spectrum.left is not None]
    rights = [spectrum.right for spectrum in spectra if spectrum.right is not None]
    deltas = stacked([spectrum.delta for spectrum in spectra])
    return Compressed.each(scaled_products(stacked(lefts) if lefts else None, stacked(rights), deltas), dtype)


def changed(weight: Tensor, spectra: Sequence[Spectrum], turns: Rotations, inplace: bool = False) -> Tensor:
    """The weight `(out, in)` with these spectra and rotations, fp32 (fp64 for an fp64 weight); `inplace`: what was in
    `weight` may be lost."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w = weight.to(dtype)
    total = w.clone() if spectra and w is weight and not inplace else w
    for spectrum in spectra:
        add_spectral_change(total, *spectrum)
    return turns.turned(total)
