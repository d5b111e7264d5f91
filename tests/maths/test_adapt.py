"""adapt() on weights of any shape, with any terms: W = R_out (W0 + sum D) R_in^T from numpy and Gram-Schmidt."""

import math
import re
from dataclasses import replace

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soda.adapt import adapt, changed
from soda.adapter import Adapter
from soda.decomposition import decompose
from soda.errors import SodaMixError
from soda.kronecker import factor_sizes
from soda.mixing import mix
from soda.precision import CPU
from soda.rotation import Logarithms

KINDS = ("lq", "svd", "qr", "none")
TERMS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 4), st.floats(-1.5, 1.5)), min_size=1, max_size=4)


def weight(shape, seed):
    """fp64, with well separated singular values, so that its SVD is one."""
    u, s, vt = numpy.linalg.svd(numpy.random.default_rng(seed).standard_normal(shape), full_matrices=False)
    return torch.from_numpy(u @ numpy.diag(numpy.linspace(3, 1, len(s))) @ vt)


def gram_schmidt(rows):
    basis = []
    for row in rows:
        for _ in range(3):
            for b in basis:
                row = row - (row @ b) * b
        basis.append(row / numpy.linalg.norm(row))
    return basis


def naive_change(w, kind, delta):
    change, k = numpy.zeros_like(w), min(w.shape)
    if kind == "svd":
        u, _, vt = numpy.linalg.svd(w, full_matrices=False)
        return sum(delta[i] * numpy.outer(u[:, i], vt[i]) for i in range(k))
    if kind == "lq":
        for i, q in enumerate(gram_schmidt(w[:k])):
            change[i] = delta[i] * q
    else:
        for i, q in enumerate(gram_schmidt(w.T[:k])):
            change[:, i] = delta[i] * q
    return change


def naive_log(logs, sizes):
    """The dense logarithm, entry by entry: factor j moves digit j of a mixed-radix index."""
    dimension = math.prod(sizes)
    total = numpy.zeros((dimension, dimension))
    digits = [numpy.unravel_index(i, sizes) for i in range(dimension)]
    for j, log in enumerate(logs):
        place = {}
        values = iter(log)
        for a in range(sizes[j]):
            for b in range(a + 1, sizes[j]):
                value = next(values)
                place[a, b], place[b, a] = value, -value
        for x in range(dimension):
            for b in range(sizes[j]):
                if b != digits[x][j]:
                    moved = list(digits[x])
                    moved[j] = b
                    total[x, numpy.ravel_multi_index(moved, sizes)] += place[int(digits[x][j]), b]
    return total


def naive_adapt(w, terms):
    """terms: (kind, delta, logs, sizes), already scaled."""
    w = w.numpy()
    changed, turns = w, {"in": numpy.zeros((w.shape[1],) * 2), "out": numpy.zeros((w.shape[0],) * 2)}
    for kind, delta, logs, sizes in terms:
        if kind != "none":
            changed = changed + naive_change(w, kind, delta)
        turns["out" if kind == "qr" else "in"] += naive_log(logs, sizes)
    rotations = {}
    for side, a in turns.items():
        angles, vectors = numpy.linalg.eigh(1j * a)
        rotations[side] = ((vectors * numpy.exp(-1j * angles)) @ vectors.conj().T).real
    return torch.from_numpy(rotations["out"] @ changed @ rotations["in"].T)


def plain(layer, strength):
    delta = None if layer.delta is None else strength * layer.delta.double().numpy()
    return layer.decomposition, delta, [strength * log.double().numpy() for log in layer.logs], layer.sizes


@given(shape=st.tuples(st.integers(1, 13), st.integers(1, 13)), terms=TERMS, seed=st.integers(0, 2**20))
def test_any_terms_on_any_shape(make_layer, shape, terms, seed):
    """Unlike decompositions and unlike factor sizes together; the mix of them, and the terms one by one."""
    w = weight(shape, seed)
    bases = {kind: decompose(w, kind) for kind in KINDS if kind != "none"}
    layers = []
    for i, (kind, count, _) in enumerate(terms):
        sizes = factor_sizes(shape[0] if kind == "qr" else shape[1], count)
        layers.append(make_layer(kind, shape, sizes if i % 2 else sizes[::-1], seed + i))
    strengths = [s for _, _, s in terms]
    expected = naive_adapt(w, [plain(layer, s) for layer, s in zip(layers, strengths, strict=True)])
    scaled = adapt(w, [layer.scaled(s) for layer, s in zip(layers, strengths, strict=True)], bases)
    assert scaled.dtype == torch.float64
    torch.testing.assert_close(scaled, expected, rtol=0, atol=5e-6)
    single = adapt(w.float(), [layer.scaled(s) for layer, s in zip(layers, strengths, strict=True)], bases)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=2e-5)
    mixed = mix([(Adapter({"w": (layer,)}), s) for layer, s in zip(layers, strengths, strict=True)])
    torch.testing.assert_close(adapt(w, mixed.layers["w"], bases), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_term_in_double_precision_is_exact_but_for_its_fp32_basis(make_layer, kind):
    w = weight((9, 12), 4)
    layer = make_layer(kind, (9, 12), factor_sizes(9 if kind == "qr" else 12, 2), 5)
    bases = {} if kind == "none" else {kind: decompose(w, kind)}
    error = (adapt(w, [layer], bases) - naive_adapt(w, [plain(layer, 1.0)])).abs().max()
    assert error < (1e-12 if kind == "none" else 1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_never_written(make_layer, kind):
    w = weight((9, 12), 4).float()
    before = w.clone()
    layer = make_layer(kind, (9, 12), factor_sizes(9 if kind == "qr" else 12, 2), 5)
    adapt(w, [layer], {} if kind == "none" else {kind: decompose(w, kind)})
    assert torch.equal(w, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_terms_that_cancel_leave_the_weight_alone(make_layer, dtype):
    """No term, zero terms, and a mix of weight 0 give back the very object; so no bit can change."""
    w = weight((8, 12), 6).to(dtype)
    layer = make_layer("lq", (8, 12), (3, 4), 7)
    assert adapt(w, [], {}) is w
    assert adapt(w, [layer.scaled(0.0), layer.scaled(-0.0)], {}) is w
    assert adapt(w, mix([(Adapter({"w": (layer,)}), 0.0)]).layers["w"], {}) is w
    against = mix([(Adapter({"w": (layer,)}), 1.0), (Adapter({"w": (layer,)}), -1.0)])
    assert adapt(w, against.layers["w"], {}) is w


@pytest.mark.parametrize("kind", ["svd", "lq", "qr"])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
def test_strength_moves_the_spectrum_in_a_straight_line(make_layer, kind, shape):
    """Rotations of any strength do not show in singular values, so those of W(s) are those of W0 + s D."""
    w = weight(shape, 8)
    layer = make_layer(kind, shape, factor_sizes(shape[0] if kind == "qr" else shape[1], 2), 9)
    bases = {kind: decompose(w, kind)}
    for strength in (-2.0, -1.0, 0.25, 1.0, 3.0):
        change = strength * naive_change(w.numpy(), kind, layer.delta.double().numpy())
        expected = numpy.linalg.svd(w.numpy() + change, compute_uv=False)
        got = torch.linalg.svdvals(adapt(w, [layer.scaled(strength)], bases))
        torch.testing.assert_close(got, torch.from_numpy(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("strength", [-1.5, 0.0, 0.4, 2.0])
@pytest.mark.parametrize("sizes", [[(3, 6)], [(3, 6), (3, 6)], [(3, 6), (2, 9), (3, 6)]])
def test_rotations_at_a_strength(make_layer, strength, sizes):
    """Of equal and of unlike factor sizes, on both sides of one weight."""
    w = weight((12, 18), 3)
    layers = [make_layer("none", (12, 18), form, seed) for seed, form in enumerate(sizes)]
    layers += [make_layer("qr", (12, 18), form, 7) for form in ((3, 4), (2, 6))[: len(sizes)]]
    still = [replace(layer, delta=None if layer.delta is None else torch.zeros(12)) for layer in layers]
    expected = naive_adapt(w, [plain(layer, strength) for layer in still])
    found = changed(w, [], Logarithms.of({"a": still}, CPU).rotations(strength, torch.float64)["a"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strength", [-3.0, 0.3, 10.0])
def test_a_rotation_keeps_the_spectrum_at_any_strength(make_layer, strength):
    w = weight((12, 18), 3)
    turned = adapt(w, [make_layer("none", (12, 18), (2, 3, 3), 4, angle=0.5).scaled(strength)], {})
    torch.testing.assert_close(torch.linalg.svdvals(turned), torch.linalg.svdvals(w), rtol=0, atol=1e-12)


def test_minus_one_undoes_a_rotation(make_layer):
    w, layer = weight((12, 18), 3), make_layer("none", (12, 18), (2, 3, 3), 4, angle=0.5)
    torch.testing.assert_close(adapt(adapt(w, [layer], {}), [layer.scaled(-1)], {}), w, rtol=0, atol=1e-12)


def test_large_dimensions_go_factor_by_factor(make_layer):
    w, layer = weight((8, 640), 1), make_layer("none", (8, 640), (8, 8, 10), 2, angle=0.1)
    torch.testing.assert_close(adapt(w, [layer], {}), naive_adapt(w, [plain(layer, 1.0)]), rtol=0, atol=1e-10)


def test_half_precision_is_computed_in_fp32(make_layer):
    half = weight((12, 18), 3).to(torch.bfloat16)
    layer = make_layer("none", (12, 18), (2, 3, 3), 4)
    assert torch.equal(adapt(half, [layer], {}), adapt(half.float(), [layer], {}))


@pytest.mark.parametrize(
    ("kind", "shape", "sizes"),
    [("lq", (5, 12), (2, 5)), ("qr", (12, 5), (5,)), ("none", (4, 4), (4, 4)), ("svd", (1, 8), (2, 3))],
)
def test_a_rotation_of_another_size_is_refused(make_layer, kind, shape, sizes):
    w = weight(shape, 1)
    with pytest.raises(SodaMixError, match=f"factor sizes {re.escape(str(sizes))}.*{re.escape(str(shape))}"):
        adapt(w, [make_layer(kind, shape, sizes, 2)], {} if kind == "none" else {kind: decompose(w, kind)})


@pytest.mark.parametrize("length", [1, 4, 6])
def test_a_spectrum_of_another_length_is_refused(make_layer, length):
    """Also of length 1, which would spread over all without a word."""
    w = weight((5, 12), 1)
    with pytest.raises(SodaMixError, match=f"spectrum of {length} numbers"):
        adapt(w, [make_layer("lq", (length, 12), (3, 4), 2)], {"lq": decompose(w, "lq")})


def test_a_basis_that_is_not_there_is_named(make_layer):
    w = weight((5, 12), 1)
    with pytest.raises(SodaMixError, match=r"no lq basis .* soda.decompose\(weight, 'lq'\)"):
        adapt(w, [make_layer("lq", (5, 12), (3, 4), 2)], {"svd": decompose(w, "svd")})
