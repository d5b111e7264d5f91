"""A weight's own basis, in which its spectrum is changed: W0 (out, in), k = min(out, in), delta (k,).

    lq    W0 = L Q      diag(L) > 0       D = [diag delta ; 0] Q      Q (k, in) orthonormal rows
    svd   W0 = U S V^T  S descending      D = U diag(delta) V^T       U (out, k), V^T (k, in)
    qr    W0 = Q T      diag(T) > 0       D = Q [diag delta , 0]      Q (out, k) orthonormal columns
    none                                  D = 0

Where an entry of the spectrum is below 1e-4 of the largest, its direction is noise: delta counts as 0 there.
The positive diagonals make lq and qr unique; U and V^T may flip sign together, which D does not notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import DECOMPOSITIONS, Decomposition

LIVE = 1e-4


@dataclass(frozen=True)
class Basis:
    """A decomposition of `(..., out, in)` weights, fp32: left `(..., out, k)`, right `(..., k, in)`, spectrum and
    live (bool) `(..., k)`."""

    decomposition: Decomposition
    left: Tensor | None
    right: Tensor | None
    spectrum: Tensor
    live: Tensor


def decompose(weight: Tensor, decomposition: Decomposition) -> Basis | None:
    """The basis of one weight or of a batch of equal shape; None for `none`.

    `svd` is computed in fp64 from the eigenvectors of the smaller Gram matrix (W W^T or W^T W), which agrees with a
    fp64 SVD to 1e-9 in D and is several times faster; `lq` and `qr` by Householder QR in fp32 or better. A device
    without fp64 hands `svd` to the CPU. Raises ValueError for an unknown decomposition or a weight that is no matrix.
    """
    if decomposition not in DECOMPOSITIONS:
        raise ValueError(f"unknown decomposition {decomposition!r}; known are {', '.join(DECOMPOSITIONS)}")
    if weight.dim() < 2:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is no matrix and has no {decomposition} basis")
    if decomposition == "none":
        return None
    if decomposition == "svd":
        return _svd(weight)
    w = weight if weight.dtype == torch.float64 else weight.float()
    q, t = torch.linalg.qr(w.mT if decomposition == "lq" else w)
    diagonal = t.diagonal(dim1=-2, dim2=-1)
    sign = torch.where(diagonal < 0, -1.0, 1.0).to(q)
    q, spectrum = (q * sign[..., None, :]).float(), (diagonal * sign).float()
    if decomposition == "lq":
        return Basis("lq", None, q.mT.contiguous(), spectrum, _live(spectrum))
    return Basis("qr", q, None, spectrum, _live(spectrum))


def _live(spectrum: Tensor) -> Tensor:
    return (spectrum >= LIVE * spectrum.amax(-1, keepdim=True)) & (spectrum > 0)


def _svd(weight: Tensor) -> Basis:
    device = weight.device
    w = (weight.cpu() if device.type == "mps" else weight).double()
    wide = w.shape[-2] <= w.shape[-1]
    values, vectors = torch.linalg.eigh(w @ w.mT if wide else w.mT @ w)
    sigma, vectors = values.flip(-1).clamp(min=0).sqrt(), vectors.flip(-1)
    live = _live(sigma)
    inverse = torch.where(live, 1 / sigma.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    if wide:
        left, right = vectors, inverse[..., :, None] * (vectors.mT @ w)
    else:
        left, right = (w @ vectors) * inverse[..., None, :], vectors.mT
    return Basis("svd", *(t.float().contiguous().to(device) for t in (left, right, sigma)), live.to(device))


def spectral_change(basis: Basis, delta: Tensor, shape: Sequence[int]) -> Tensor:
    """D `(..., out, in)` of a delta `(..., k)`, 0 where the spectrum is not live; `shape` is the weight's."""
    delta = torch.where(basis.live, delta, 0.0)
    if basis.decomposition == "svd":
        scaled = basis.left * delta[..., None, :]
        return scaled @ basis.right.to(scaled.dtype)
    if basis.decomposition == "lq":
        rows = delta[..., :, None] * basis.right
        return _padded(rows, (0, 0, 0, shape[-2] - rows.shape[-2]))
    columns = basis.left * delta[..., None, :]
    return _padded(columns, (0, shape[-1] - columns.shape[-1]))


def _padded(x: Tensor, padding: tuple[int, ...]) -> Tensor:
    return F.pad(x, padding) if any(padding) else x  # F.pad copies even where there is nothing to add
