"""A weight's own basis, in which its spectrum is changed: W0 (out, in), k = min(out, in), delta (k,).

    lq    W0 = L Q      diag(L) > 0       D = [diag delta ; 0] Q      Q (k, in) orthonormal rows
    svd   W0 = U S V^T  S descending      D = U diag(delta) V^T       U (out, k), V^T (k, in)
    qr    W0 = Q T      diag(T) > 0       D = Q [diag delta , 0]      Q (out, k) orthonormal columns
    none                                  D = 0

Where an entry of the spectrum is below 1e-4 of the largest, its direction is noise: delta counts as 0 there.
The positive diagonals make lq and qr unique; U and V^T may flip sign together, which D does not notice. Only the
first k rows (lq) or columns (qr) of W0 have a say in Q. A row that is a combination of those before it has no
direction of its own: its q is whatever fits, takes no delta, and leaves the rows after it as arbitrary.

svd comes from the fp64 eigenvectors of the smaller Gram matrix, W W^T = U S^2 U^T or W^T W = V S^2 V^T; the other side
is V^T = S^-1 U^T W, its rows scaled to length 1. A basis keeps both, since from rounded vectors of one side the other
would come out wrong by sigma_max / sigma times as much:

    kept by a basis (SDXL's 560 attention matrices, 0.955 B weights)         numbers       kept, in fp16
    lq, qr   Q                                                               955 M         1.9 GB
    svd      U and V^T                                                       1774 M        3.6 GB

With them it keeps its vectors' products with the two random matrices of `fingerprint`, from which follows the sketch of
any D at once, sketch(D) = (S_1 U) diag(delta) (V^T S_2^T) / 8, where U = I for lq and V = I for qr: 16 k numbers.

Relative error of D against fp64, 1280 x 1280 (benchmarks/decomposition.py): svd in fp64 3e-13 to 3e-10, kept in fp32
1e-7, in fp16 3e-4 (torch.linalg.svd in fp32 has 1e-4 to 3e-3); lq in fp32 1e-6 to 1e-5, in fp64 1e-12, kept in fp16
2e-4. Vectors enter D as they are, so that their rounding does not grow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import DECOMPOSITIONS, Decomposition
from .fingerprint import SKETCH_SIZE, random_matrices
from .precision import CPU, full_fp32, has_fp64, is_fast_in_fp64, tf32

Key = tuple[str, Decomposition]  # the hash of a weight and what was made of it

LIVE = 1e-4
KEPT_DTYPE = torch.float16
VECTORS = ("left", "right")
PASSES = 3
STREAMS = 4
LOOPED = 256  # from here on cuSOLVER's one Cholesky after the other outruns its batched kernel, made for small ones


@dataclass(frozen=True)
class Basis:
    """A decomposition of `(..., out, in)` weights: left `(..., out, k)` and right `(..., k, in)`, svd both, lq right
    and qr left alone; spectrum and live (bool) `(..., k)`; probes `(..., k, 16)`, left^T S_1^T and right S_2^T, None in
    training. An outline is one without vectors. mapped: whether its tensors lie in a file."""

    decomposition: Decomposition
    left: Tensor | None
    right: Tensor | None
    spectrum: Tensor
    live: Tensor
    probes: Tensor | None = None
    mapped: bool = False

    @classmethod
    def of(cls, decomposition: Decomposition, tensors: Mapping[str, Tensor]) -> Basis:
        """The inverse of `tensors`."""
        left, right, probes = (tensors.get(name) for name in ("left", "right", "probes"))
        return cls(decomposition, left, right, tensors["spectrum"], tensors["live"], probes)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name, as `kept_form` orders them."""
        named = {name: getattr(self, name) for name in ("spectrum", "probes", *VECTORS, "live")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """The bytes that its tensors take."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def whole(self) -> bool:
        """Whether it is more than an outline."""
        return self.left is not None or self.right is not None

    @cached_property
    def all_live(self) -> bool:
        """Whether the whole spectrum is."""
        return bool(self.live.all())

    def outline(self) -> Basis:
        """What says whether a D is right here, without what makes it."""
        return replace(self, left=None, right=None)

    def kept(self) -> Basis:
        """The form in which it is kept and applied: vectors in fp16, all else in fp32."""
        kinds = {"left": KEPT_DTYPE, "right": KEPT_DTYPE, "live": torch.bool}
        return Basis.of(self.decomposition, {n: t.to(kinds.get(n, torch.float32)) for n, t in self.tensors().items()})

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it has the tensors of a kept basis of one weight `(out, in)`."""
        form = kept_form(shape, self.decomposition)
        return [(n, tuple(t.shape), t.dtype) for n, t in self.tensors().items()] == [(n, *f) for n, f in form.items()]


def kept_form(shape: Sequence[int], decomposition: Decomposition) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the kept basis of one weight `(out, in)`, by name, in an order in which one after the other
    they are aligned."""
    (out, inner), k = shape, min(shape)
    vectors = {"left": ((out, k), KEPT_DTYPE), "right": ((k, inner), KEPT_DTYPE)}
    vectors.pop({"lq": "left", "qr": "right"}.get(decomposition, ""), None)
    return {
        "spectrum": ((k,), torch.float32),
        "probes": ((k, 2 * SKETCH_SIZE), torch.float32),
        **vectors,
        "live": ((k,), torch.bool),
    }


@lru_cache(maxsize=1 << 10)
def kept_bytes(shape: tuple[int, ...], decomposition: Decomposition) -> int:
    """Bytes of the kept basis of one weight `(out, in)`."""
    return sum(math.prod(part) * dtype.itemsize for part, dtype in kept_form(shape, decomposition).values())


@torch.no_grad()
def decompose(weight: Tensor, decomposition: Decomposition, dtype: torch.dtype = torch.float32) -> Basis | None:
    """The basis of one weight or of a batch of equal shape, kept in `dtype` (fp32 or fp64), on the weight's device;
    None for `none`.

    `svd` is computed in fp64; `lq` and `qr` by Householder QR on a CPU and by Cholesky QR on a GPU, in fp64 if the
    weight or `dtype` is fp64 or the GPU is fast at it, else in fp32. Devices without fp64 send the weight to the CPU.
    Raises ValueError for an unknown decomposition or a weight that is no matrix or not finite.
    """
    if decomposition not in DECOMPOSITIONS:
        raise ValueError(f"unknown decomposition {decomposition!r}; known are {', '.join(DECOMPOSITIONS)}")
    if weight.dim() < 2:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is no matrix and has no {decomposition} basis")
    if decomposition == "none":
        return None
    home = weight.device
    w = weight if has_fp64(home) else weight.to(CPU)
    exact = decomposition == "svd" or torch.float64 in (w.dtype, dtype) or (w.is_cuda and is_fast_in_fp64(w.device))
    w = w.to(torch.float64 if exact else torch.float32)
    if not w.isfinite().all():
        raise ValueError("the weight holds NaN or infinite numbers and has no basis; load another model")
    with full_fp32():
        if decomposition == "svd":
            vectors, spectrum = _svd(w)
        elif decomposition == "lq":
            q, spectrum = _lq(w)
            vectors = {"right": q}
        else:
            q, spectrum = _lq(w.mT)
            vectors = {"left": q.mT}
        live = (spectrum >= LIVE * spectrum.amax(-1, keepdim=True)) & (spectrum > 0)
        probes = _probes(vectors, w)
    parts = {**{side: v.contiguous() for side, v in vectors.items()}, "spectrum": spectrum, "probes": probes}
    parts = {name: tensor.to(home, dtype) for name, tensor in parts.items()}
    return Basis.of(decomposition, {**parts, "live": live.to(home)})


def _svd(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """U `(..., out, k)` and V^T `(..., k, in)`, and S `(..., k)`, descending: one side from the Gram matrix, the other
    from it and w."""
    if w.shape[-2] > w.shape[-1]:
        sides, spectrum = _svd(w.mT)
        return {"left": sides["right"].mT, "right": sides["left"].mT}, spectrum
    values, u = _eigh(w @ w.mT)
    u = u.flip(-1)
    other = F.normalize(u.mT @ w, dim=-1, eps=torch.finfo(w.dtype).tiny)
    return {"left": u, "right": other}, values.flip(-1).clamp(min=0).sqrt()


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh`, on a GPU some matrices at a time: one alone leaves most of it idle."""
    if not gram.is_cuda or gram.dim() != 3 or len(gram) == 1:
        return torch.linalg.eigh(gram)
    values, vectors = gram.new_empty(gram.shape[:-1]), torch.empty_like(gram)
    torch.linalg.eigh(gram[0, :1, :1])  # the first call loads the solvers, which two threads at once must not do
    caller = torch.cuda.current_stream(gram.device)

    def solve(first: int) -> None:
        stream = stream_beside(gram.device, first)
        stream.wait_stream(caller)
        with torch.inference_mode(gram.is_inference()), torch.cuda.stream(stream):
            for i in range(first, len(gram), STREAMS):
                values[i], vectors[i] = torch.linalg.eigh(gram[i])
        caller.wait_stream(stream)

    with ThreadPoolExecutor(STREAMS) as pool:  # each solution ends with the host waiting for it
        list(pool.map(solve, range(min(STREAMS, len(gram)))))
    return values, vectors


@lru_cache(maxsize=64)
def stream_beside(device: torch.device, index: int) -> torch.cuda.Stream:
    """The same one at each call: what was freed on a stream is there for that stream alone, and new memory has a GPU
    wait."""
    return torch.cuda.Stream(device)


def _lq(w: Tensor) -> tuple[Tensor, Tensor]:
    """Q `(..., k, in)` and diag(L) `(..., k)` of w = L Q."""
    w = w[..., : w.shape[-1], :]
    q = _cholesky_lq(w) if w.is_cuda else _householder_lq(w)
    return q, torch.einsum("...ij,...ij->...i", w, q).clamp_(min=0)


def _householder_lq(w: Tensor) -> Tensor:
    q, t = torch.linalg.qr(w.mT)
    diagonal = t.diagonal(dim1=-2, dim2=-1)
    return (q * torch.where(diagonal < 0, -1.0, 1.0).to(q)[..., None, :]).mT


def _cholesky_lq(w: Tensor) -> Tensor:
    """Q by repeated Cholesky QR: Q <- chol(Q Q^T)^-1 Q from Q = W until Q Q^T = I; products and few launches.

    Each pass is backward stable, so a Q that ends orthonormal is the right one, as near as Householder's. Cholesky
    fails or does not get there for numerically dependent rows (condition 1e8 in fp64, 1e4 in fp32): those matrices
    go through Householder. (Fukaya et al., CholeskyQR2, 2014.)
    """
    shape, w = w.shape, w.reshape(-1, *w.shape[-2:])
    tolerance = 1e-8 if w.dtype == torch.float64 else 4e-6
    q = F.normalize(w, dim=-1, eps=torch.finfo(w.dtype).tiny)  # Q does not depend on the rows' lengths
    gram, eye = q @ q.mT, torch.eye(q.shape[-2], dtype=q.dtype, device=q.device)
    for _ in range(PASSES):
        q = torch.linalg.solve_triangular(_cholesky(gram), q, upper=False)
        gram = q @ q.mT
        good = (gram - eye).abs_().amax((-2, -1)) <= tolerance
        if good.all():
            break
    for index in (~good).nonzero().flatten().tolist():
        q[index] = _householder_lq(w[index])
    return q.reshape(shape)


def _cholesky(gram: Tensor) -> Tensor:
    """The lower factor of each matrix; whatever came out where one is not positive definite."""
    if gram.shape[-1] < LOOPED:
        return torch.linalg.cholesky_ex(gram)[0]
    return torch.stack([torch.linalg.cholesky_ex(one)[0] for one in gram])


def _probes(vectors: Mapping[str, Tensor], w: Tensor) -> Tensor:
    """`Basis.probes` of the vectors of w. To be called within `full_fp32`."""
    first, second = (matrix.to(w).mT for matrix in random_matrices(w.shape))
    k = min(w.shape[-2:])
    left = vectors["left"].mT @ first if "left" in vectors else first[:k]
    right = vectors["right"] @ second if "right" in vectors else second[:k]
    return torch.cat(torch.broadcast_tensors(left, right), -1)


def spectral_change(basis: Basis, delta: Tensor, weight: Tensor) -> Tensor:
    """D `(..., out, in)` of a delta `(..., k)`, 0 where the spectrum is not live, for a weight of this shape."""
    delta = torch.where(basis.live, delta, 0.0)
    if basis.left is not None and basis.right is not None:
        scaled = basis.left * delta[..., None, :]
        dtype = torch.promote_types(scaled.dtype, basis.right.dtype)
        with full_fp32():
            return scaled.to(dtype) @ basis.right.to(dtype)
    if basis.right is not None:
        return _padded(delta[..., :, None] * basis.right, weight.shape)
    assert basis.left is not None
    return _padded(basis.left * delta[..., None, :], weight.shape)


def add_spectral_change(total: Tensor, left: Tensor | None, right: Tensor | None, delta: Tensor) -> None:
    """total += D, where `delta` is 0 already for all that is not live; one pass, and no D, for lq and qr.

    left, right: a basis's, in any dtype; delta, total: fp32 or fp64; all on one device.
    """
    if left is not None and right is not None:
        with _product_precision(left):
            total.addmm_((left * delta).to(total.dtype), right.to(total.dtype))
    elif right is not None:
        total[: len(delta)].addcmul_(delta[:, None], right)
    elif left is not None:
        total[:, : len(delta)].addcmul_(left, delta)


def scaled_products(left: Tensor | None, right: Tensor, delta: Tensor) -> Tensor:
    """D `(n, k, in)` of lq or `(n, out, in)` of svd, in the dtype of delta `(n, k)`; else as `add_spectral_change`."""
    if left is None:
        return delta[..., None] * right
    scaled, right = (left * delta[:, None]).to(delta.dtype), right.to(delta.dtype)
    products = scaled.new_empty(*scaled.shape[:-1], right.shape[-1])
    with _product_precision(left):
        for product, one, other in zip(products, scaled, right, strict=True):  # a batched product rounds otherwise
            torch.mm(one, other, out=product)
    return products


def _product_precision(left: Tensor) -> AbstractContextManager[None]:
    """Vectors in fp16 are multiplied in TF32, which rounds to as many bits, where the device has it."""
    return tf32() if left.dtype == torch.float16 and left.is_cuda else full_fp32()


def spectral_sketch(basis: Basis, delta: Tensor) -> Tensor:
    """`fingerprint.sketch` of the D of a delta `(..., k)`, without D or the weight; `(..., 8, 8)` fp32 on the CPU."""
    assert basis.probes is not None
    left, right = basis.probes.to(CPU).split(SKETCH_SIZE, -1)
    delta = torch.where(basis.live.to(CPU), delta.to(left), 0.0)
    return ((left * delta[..., None]).mT @ right / SKETCH_SIZE).float()


def _padded(x: Tensor, shape: Sequence[int]) -> Tensor:
    rows, columns = shape[-2] - x.shape[-2], shape[-1] - x.shape[-1]
    return F.pad(x, (0, columns, 0, rows)) if rows or columns else x  # F.pad copies even where there is nothing to add
