"""The bases against torch.linalg's SVD and Gram-Schmidt in double precision, of any shape and rank."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soda.decomposition import (
    LIVE,
    Basis,
    _cholesky_lq,
    add_spectral_change,
    decompose,
    kept_bytes,
    spectral_change,
    spectral_sketch,
)
from soda.fingerprint import sketch

SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 24))
SEEDS = st.integers(0, 2**31)
SPECTRAL = ["lq", "svd", "qr"]


def normal(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive_change(w, delta, decomposition):
    """D in fp64: lq by Gram-Schmidt on the rows, svd by torch, qr by Gram-Schmidt on the columns."""
    out, inner = w.shape
    k = min(out, inner)
    change = torch.zeros_like(w)
    if decomposition == "svd":
        u, _, vt = torch.linalg.svd(w, full_matrices=False)
        for i in range(k):
            change += delta[i] * torch.outer(u[:, i], vt[i])
        return change
    lines = w if decomposition == "lq" else w.mT
    basis = []
    for i in range(k):
        line = lines[i].clone()
        for _ in range(3):
            for b in basis:
                line = line - (line @ b) * b
        basis.append(line / line.norm())
    for i, b in enumerate(basis):
        if decomposition == "lq":
            change[i] += delta[i] * b
        else:
            change[:, i] += delta[i] * b
    return change


def well_conditioned(shape, seed):
    u, s, vt = torch.linalg.svd(normal(*shape, seed=seed), full_matrices=False)
    return u @ torch.diag(torch.linspace(3, 1, len(s), dtype=torch.float64)) @ vt


def relative(found, exact):
    return float(torch.linalg.matrix_norm(found.double() - exact) / torch.linalg.matrix_norm(exact))


@pytest.mark.parametrize("decomposition", SPECTRAL)
@given(shape=SHAPES, seed=SEEDS)
def test_the_change_is_the_naive_one(decomposition, shape, seed):
    w = well_conditioned(shape, seed)
    delta = normal(min(shape), seed=seed + 1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        basis = decompose(w, decomposition, dtype)
        assert basis.live.all() and basis.spectrum.dtype == dtype
        change = spectral_change(basis, delta, w)
        torch.testing.assert_close(change.double(), naive_change(w, delta, decomposition), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(200, 200), (150, 240), (240, 150)])
@pytest.mark.parametrize("lowest", [1e-1, 1e-2, 1e-3])
def test_the_precision_promised(shape, lowest):
    """Against fp64 SVD and Householder QR, spectra over one to three orders of magnitude."""
    k = min(shape)
    u, _, vt = torch.linalg.svd(normal(*shape, seed=0), full_matrices=False)
    w = ((u * torch.logspace(0, math.log10(lowest), k, dtype=torch.float64)) @ vt).float()
    delta = normal(k, seed=1)
    u, _, vt = torch.linalg.svd(w.double(), full_matrices=False)
    exact = (u * delta) @ vt
    assert relative(spectral_change(decompose(w, "svd", torch.float64), delta, w), exact) <= 1e-9
    assert relative(spectral_change(decompose(w, "svd"), delta.float(), w), exact) <= 3e-7
    q, t = torch.linalg.qr(w.double()[:k].mT)
    exact = torch.zeros(shape, dtype=torch.float64)
    exact[:k] = (delta * t.diagonal().sign())[:, None] * q.mT
    assert relative(spectral_change(decompose(w, "lq", torch.float64), delta, w), exact) <= 1e-11
    assert relative(spectral_change(decompose(w, "lq"), delta.float(), w), exact) <= max(1e-5, 3e-8 / lowest)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
def test_svd_is_canonical(shape):
    """Precise where a single precision solver is not: neighbouring singular values 1e-3 apart."""
    u, _, vt = torch.linalg.svd(normal(*shape, seed=0), full_matrices=False)
    sigma = torch.linspace(1.04, 1, min(shape), dtype=torch.float64)
    w = u @ torch.diag(sigma) @ vt
    basis = decompose(w, "svd", torch.float64)
    torch.testing.assert_close(basis.spectrum, sigma, rtol=0, atol=1e-12)
    delta = normal(min(shape), seed=1)
    assert relative(spectral_change(basis, delta, w), (u * delta) @ vt) <= 1e-10
    assert relative(spectral_change(decompose(w, "svd"), delta, w), (u * delta) @ vt) <= 2e-6
    assert (basis.spectrum.diff() <= 0).all()


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (8, 8)])
def test_svd_has_both_sides(shape):
    """Of weights without full rank too."""
    batch = normal(3, *shape, seed=1)
    batch[1, :, 0] = batch[1, :, 1] = batch[1, 0] = 0
    basis = decompose(batch, "svd", torch.float64)
    k = min(shape)
    assert basis.left.shape == (3, shape[0], k) and basis.right.shape == (3, k, shape[1])
    rebuilt = (basis.left * (basis.spectrum * basis.live)[..., None, :]) @ basis.right
    torch.testing.assert_close(rebuilt, batch, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(k=st.integers(1, 20), more=st.integers(0, 8), seed=SEEDS, scales=st.booleans())
def test_cholesky_finds_the_same_rows_as_gram_schmidt(dtype, k, more, seed, scales):
    """The way of GPUs, on any matrix that has rows of its own."""
    w = well_conditioned((k, k + more), seed) * torch.exp(normal(k, 1, seed=seed + 1) * (3 if scales else 0))
    exact = naive_change(w, torch.ones(k, dtype=torch.float64), "lq")
    torch.testing.assert_close(
        _cholesky_lq(w.to(dtype)).double(), exact, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-11
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cholesky_leaves_dependent_rows_to_householder(dtype):
    batch = normal(4, 10, 12, seed=3).to(dtype)
    batch[1, 6:] = batch[1, :4] + batch[1, 1:5]
    batch[2] = 0
    batch[3, 5] = batch[3, 4] * (1 + 1e-12)
    q = _cholesky_lq(batch)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(q @ q.mT, torch.eye(10, dtype=dtype).expand(4, -1, -1), rtol=0, atol=tolerance)
    torch.testing.assert_close((batch @ q.mT).triu(1), torch.zeros(4, 10, 10, dtype=dtype), rtol=0, atol=10 * tolerance)
    torch.testing.assert_close(q[0], _cholesky_lq(batch[0]), rtol=0, atol=tolerance)


@given(shape=SHAPES, seed=SEEDS)
def test_a_basis_fits_its_own_shape_alone(shape, seed):
    for decomposition in SPECTRAL:
        basis = decompose(normal(*shape, seed=seed), decomposition).kept()
        assert basis.fits(shape) and basis.nbytes == kept_bytes(shape, decomposition)
        assert not basis.fits((shape[0] + 1, shape[1] + 1))
        assert Basis.of(decomposition, basis.tensors()) == basis
        assert decompose(normal(*shape, seed=seed), decomposition, torch.float64).kept().fits(shape)
        assert not decompose(normal(*shape, seed=seed), decomposition, torch.float64).fits(shape)


@pytest.mark.parametrize("lowest", [1, 1e-3])
@pytest.mark.parametrize("shape", [(96, 96), (64, 96), (96, 64)])
@pytest.mark.parametrize("decomposition", SPECTRAL)
def test_a_kept_basis_changes_a_weight_as_the_exact_one_does(shape, decomposition, lowest):
    """Gaussian weights, and such whose spectrum falls by three orders of magnitude."""
    w, delta = normal(*shape, seed=6), normal(min(shape), seed=7).float()
    u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
    w = ((u * sigma * torch.logspace(0, math.log10(lowest), min(shape), dtype=w.dtype)) @ vt).float()
    exact = spectral_change(decompose(w.double(), decomposition, torch.float64), delta.double(), w.double())
    kept, total = decompose(w, decomposition).kept(), w.clone()
    add_spectral_change(total, kept.left, kept.right, delta * kept.live)
    error = (total.double() - w - exact).norm() / exact.norm()
    assert error < (4e-4 if decomposition == "svd" else 3e-4)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 6), (6, 1)])
def test_lq_and_qr_have_positive_diagonals_and_rebuild_the_weight(shape):
    w = normal(*shape, seed=sum(shape))
    k = min(shape)
    lq = decompose(w, "lq")
    q = lq.right.double()
    lower = w @ q.mT
    assert lq.left is None and q.shape == (k, shape[1])
    torch.testing.assert_close(q @ q.mT, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(lower[:k].triu(1), torch.zeros(k, k, dtype=torch.float64), rtol=0, atol=1e-5)
    assert (lower.diagonal() > 0).all()
    torch.testing.assert_close(lq.spectrum.double(), lower.diagonal(), rtol=0, atol=1e-5)
    if shape[0] <= shape[1]:
        torch.testing.assert_close(lower @ q, w, rtol=0, atol=1e-5)
    qr = decompose(w, "qr")
    q = qr.left.double()
    upper = q.mT @ w
    assert qr.right is None and q.shape == (shape[0], k)
    torch.testing.assert_close(upper[:, :k].tril(-1), torch.zeros(k, k, dtype=torch.float64), rtol=0, atol=1e-5)
    assert (upper.diagonal() > 0).all()
    torch.testing.assert_close(qr.spectrum.double(), upper.diagonal(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("decomposition", SPECTRAL)
def test_the_spectrum_moves_by_delta(decomposition):
    """Decomposing W0 + D again shows delta on the spectrum: what the method means by shifting it."""
    w = well_conditioned((12, 20) if decomposition == "lq" else (20, 12), 5)
    delta = 0.02 * normal(12, seed=6).abs()
    basis = decompose(w, decomposition)
    shifted = decompose(w + spectral_change(basis, delta, w), decomposition)
    moved = basis.spectrum + delta.float()
    if decomposition == "svd":
        moved = moved.sort(descending=True).values
    torch.testing.assert_close(shifted.spectrum, moved, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("decomposition", SPECTRAL)
def test_low_precision_weights_decompose_as_their_fp32_copies(decomposition, dtype):
    w = normal(10, 14, seed=2).to(dtype)
    low, full = decompose(w, decomposition), decompose(w.float(), decomposition)
    assert low.spectrum.dtype == torch.float32 and torch.equal(low.spectrum, full.spectrum)
    delta = torch.ones(10)
    assert torch.equal(spectral_change(low, delta, w), spectral_change(full, delta, w))


@pytest.mark.parametrize("decomposition", SPECTRAL)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (8, 8)])
def test_a_batch_is_each_alone(decomposition, shape):
    batch = normal(4, *shape, seed=3)
    batch[2] = 0
    batch[3, :, 0] = batch[3, :, 1]
    delta = normal(4, min(shape), seed=4)
    basis = decompose(batch, decomposition)
    changes = spectral_change(basis, delta, batch)
    for b in range(4):
        alone = decompose(batch[b], decomposition)
        assert torch.equal(basis.live[b], alone.live)
        torch.testing.assert_close(basis.spectrum[b], alone.spectrum, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(changes[b], spectral_change(alone, delta[b], batch[b]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decomposition", SPECTRAL)
@pytest.mark.parametrize("shape", [(8, 14), (14, 8), (11, 11)])
def test_noise_directions_take_no_delta(decomposition, shape):
    """A weight of rank 5: the rest of its basis is arbitrary, so delta must not act there."""
    w = normal(shape[0], 5, seed=7) @ normal(5, shape[1], seed=8)
    basis = decompose(w, decomposition)
    assert int(basis.live.sum()) == 5
    assert torch.equal(basis.live, basis.spectrum >= LIVE * basis.spectrum.max())
    delta = normal(min(shape), seed=9)
    change = spectral_change(basis, delta, w)
    assert torch.isfinite(change).all()
    assert torch.equal(change, spectral_change(basis, torch.where(basis.live, delta, 1e3), w))
    if decomposition == "svd":
        u, _, vt = torch.linalg.svd(w, full_matrices=False)
        exact = (u[:, :5] * delta[:5]) @ vt[:5]
        torch.testing.assert_close(change.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("decomposition", SPECTRAL)
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 1)])
def test_a_zero_weight_takes_no_delta(decomposition, shape):
    w = torch.zeros(shape)
    basis = decompose(w, decomposition)
    assert not basis.live.any() and torch.isfinite(basis.spectrum).all()
    assert not spectral_change(basis, torch.ones(min(shape)), w).any()


@given(SHAPES, SEEDS, st.integers(0, 24), st.sampled_from(SPECTRAL))
def test_the_sketch_of_a_change_needs_no_change(shape, seed, lost, decomposition):
    """Also of weights without full rank, where some of delta does not count."""
    w = normal(*shape, seed=seed)
    w[: min(lost, len(w) - 1)] = 0
    delta = normal(min(shape), seed=seed + 1)
    basis = decompose(w, decomposition, torch.float64)
    expected = sketch(spectral_change(basis, delta, w))
    assert torch.allclose(spectral_sketch(basis, delta), expected, rtol=1e-5, atol=1e-5)
    kept = spectral_sketch(basis.kept(), delta)
    assert torch.allclose(kept, expected, rtol=1e-4, atol=1e-4 * (1 + expected.abs().max()))


@pytest.mark.parametrize("decomposition", SPECTRAL)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_weight_does_not_matter(decomposition, scale):
    w = well_conditioned((9, 7), 1)
    delta = normal(7, seed=2)
    unit = spectral_change(decompose(w, decomposition), delta, w)
    scaled = spectral_change(decompose(w * scale, decomposition), delta, w * scale)
    torch.testing.assert_close(scaled, unit, rtol=0, atol=1e-5)


def test_none_has_no_basis_and_the_rest_is_refused():
    assert decompose(torch.ones(2, 2), "none") is None
    with pytest.raises(ValueError, match="lq, svd, qr, none"):
        decompose(torch.ones(2, 2), "lu")
    with pytest.raises(ValueError, match="no matrix"):
        decompose(torch.ones(3), "lq")
    for kind in SPECTRAL:
        with pytest.raises(ValueError, match="NaN or infinite"):
            decompose(torch.tensor([[1.0, float("nan")]]), kind)
