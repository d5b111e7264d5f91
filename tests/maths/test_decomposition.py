"""The bases against torch.linalg's SVD and QR in double precision, of any shape and rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soda.decomposition import LIVE, decompose, spectral_change

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


@pytest.mark.parametrize("decomposition", SPECTRAL)
@given(shape=SHAPES, seed=SEEDS)
def test_the_change_is_the_naive_one(decomposition, shape, seed):
    w = well_conditioned(shape, seed)
    delta = normal(min(shape), seed=seed + 1)
    basis = decompose(w, decomposition)
    assert basis.live.all()
    change = spectral_change(basis, delta, shape)
    torch.testing.assert_close(change.double(), naive_change(w, delta, decomposition), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
def test_svd_is_canonical(shape):
    """Precise where a single precision solver is not: neighbouring singular values 1e-3 apart."""
    u, _, vt = torch.linalg.svd(normal(*shape, seed=0), full_matrices=False)
    sigma = torch.linspace(1.04, 1, min(shape), dtype=torch.float64)
    w = u @ torch.diag(sigma) @ vt
    basis = decompose(w, "svd")
    torch.testing.assert_close(basis.spectrum.double(), sigma, rtol=0, atol=1e-6)
    delta = normal(min(shape), seed=1)
    exact = (u * delta) @ vt
    error = torch.linalg.matrix_norm(spectral_change(basis, delta, shape).double() - exact)
    assert error <= 2e-6 * torch.linalg.matrix_norm(exact)
    assert (basis.spectrum.diff() <= 0).all()


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
    shifted = decompose(w + spectral_change(basis, delta, w.shape), decomposition)
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
    assert torch.equal(spectral_change(low, delta, w.shape), spectral_change(full, delta, w.shape))


@pytest.mark.parametrize("decomposition", SPECTRAL)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (8, 8)])
def test_a_batch_is_each_alone(decomposition, shape):
    batch = normal(4, *shape, seed=3)
    batch[2] = 0
    batch[3, :, 0] = batch[3, :, 1]
    delta = normal(4, min(shape), seed=4)
    basis = decompose(batch, decomposition)
    changes = spectral_change(basis, delta, shape)
    for b in range(4):
        alone = decompose(batch[b], decomposition)
        assert torch.equal(basis.live[b], alone.live)
        torch.testing.assert_close(basis.spectrum[b], alone.spectrum, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(changes[b], spectral_change(alone, delta[b], shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decomposition", SPECTRAL)
@pytest.mark.parametrize("shape", [(8, 14), (14, 8), (11, 11)])
def test_noise_directions_take_no_delta(decomposition, shape):
    """A weight of rank 5: the rest of its basis is arbitrary, so delta must not act there."""
    w = normal(shape[0], 5, seed=7) @ normal(5, shape[1], seed=8)
    basis = decompose(w, decomposition)
    assert int(basis.live.sum()) == 5
    assert torch.equal(basis.live, basis.spectrum >= LIVE * basis.spectrum.max())
    delta = normal(min(shape), seed=9)
    change = spectral_change(basis, delta, shape)
    assert torch.isfinite(change).all()
    assert torch.equal(change, spectral_change(basis, torch.where(basis.live, delta, 1e3), shape))
    if decomposition == "svd":
        u, _, vt = torch.linalg.svd(w, full_matrices=False)
        exact = (u[:, :5] * delta[:5]) @ vt[:5]
        torch.testing.assert_close(change.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("decomposition", SPECTRAL)
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 1)])
def test_a_zero_weight_takes_no_delta(decomposition, shape):
    basis = decompose(torch.zeros(shape), decomposition)
    assert not basis.live.any() and torch.isfinite(basis.spectrum).all()
    assert not spectral_change(basis, torch.ones(min(shape)), shape).any()


@pytest.mark.parametrize("decomposition", SPECTRAL)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_weight_does_not_matter(decomposition, scale):
    w = well_conditioned((9, 7), 1)
    delta = normal(7, seed=2)
    unit = spectral_change(decompose(w, decomposition), delta, w.shape)
    scaled = spectral_change(decompose(w * scale, decomposition), delta, w.shape)
    torch.testing.assert_close(scaled, unit, rtol=0, atol=1e-5)


def test_none_has_no_basis_and_the_rest_is_refused():
    assert decompose(torch.ones(2, 2), "none") is None
    with pytest.raises(ValueError, match="lq, svd, qr, none"):
        decompose(torch.ones(2, 2), "lu")
    with pytest.raises(ValueError, match="no matrix"):
        decompose(torch.ones(3), "lq")
