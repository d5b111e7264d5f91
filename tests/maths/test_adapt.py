"""Adapted weights against W = R_out (W0 + sum D) R_in^T written out with dense matrices."""

import math

import pytest
import torch

from soda.adapt import adapt
from soda.adapter import Adapter, Layer
from soda.decomposition import decompose, spectral_change
from soda.errors import SodaMixError
from soda.mixing import mix

KINDS = ["lq", "svd", "qr", "none"]
SHAPE = (12, 18)


def random_layer(kind, sizes, shape=SHAPE, scale=0.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    logs = tuple(scale * torch.randn(n * (n - 1) // 2, generator=g) for n in sizes)
    return Layer(kind, None if kind == "none" else scale * torch.randn(min(shape), generator=g), logs)


def sizes_for(kind, shape=SHAPE):
    return {12: (2, 2, 3), 18: (2, 3, 3)}[shape[0] if kind == "qr" else shape[1]]


def naive_log(layer):
    """sum_j I x A_j x I, dense."""
    total = torch.zeros(layer.dimension, layer.dimension, dtype=torch.float64)
    for j, log in enumerate(layer.logs):
        n = layer.sizes[j]
        a = torch.zeros(n, n, dtype=torch.float64)
        a[tuple(torch.triu_indices(n, n, 1))] = log.double()
        before, after = math.prod(layer.sizes[:j]), math.prod(layer.sizes[j + 1 :])
        eye = [torch.eye(m, dtype=torch.float64) for m in (before, after)]
        total += torch.kron(torch.kron(eye[0], a - a.mT), eye[1])
    return total


def naive(w, layers, bases):
    changed = w.double()
    for layer in layers:
        if layer.delta is not None:
            changed = changed + spectral_change(bases[layer.decomposition], layer.delta, w.float()).double()
    turn = {side: torch.zeros(n, n, dtype=torch.float64) for side, n in (("output", w.shape[0]), ("input", w.shape[1]))}
    for layer in layers:
        turn[layer.side] += naive_log(layer)
    exp = {side: torch.linalg.matrix_exp(a) for side, a in turn.items()}
    return exp["output"] @ changed @ exp["input"].mT


@pytest.fixture
def base():
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    return w, {kind: decompose(w, kind) for kind in KINDS[:3]}


@pytest.mark.parametrize("kind", KINDS)
def test_one_term(base, kind):
    layer = random_layer(kind, sizes_for(kind))
    assert torch.allclose(adapt(base[0], [layer], base[1]).double(), naive(base[0], [layer], base[1]), atol=3e-6)


def test_terms_of_all_decompositions(base):
    layers = [random_layer(kind, sizes_for(kind), seed=i) for i, kind in enumerate(KINDS)]
    assert torch.allclose(adapt(base[0], layers, base[1]).double(), naive(base[0], layers, base[1]), atol=3e-6)


def test_unlike_factor_sizes_go_through_the_sum_of_logarithms(base):
    layers = [random_layer("lq", (2, 3, 3)), random_layer("lq", (3, 6), seed=1), random_layer("none", (18,), seed=2)]
    assert torch.allclose(adapt(base[0], layers, base[1]).double(), naive(base[0], layers, base[1]), atol=3e-6)
    assert torch.allclose(adapt(base[0], layers[::-1], base[1]), adapt(base[0], layers, base[1]), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_strength_is_the_weight_itself(base, kind):
    layer = random_layer(kind, sizes_for(kind)).scaled(0.0)
    assert layer.is_zero() and adapt(base[0], [layer], base[1]) is base[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [-1.0, 0.5, 1.0, 2.0])
def test_strength_follows_the_group(base, kind, strength):
    layer = random_layer(kind, sizes_for(kind))
    scaled = Layer(kind, None if layer.delta is None else strength * layer.delta,
                   tuple(strength * log for log in layer.logs))  # fmt: skip
    assert torch.allclose(
        adapt(base[0], [layer.scaled(strength)], base[1]).double(), naive(base[0], [scaled], base[1]), atol=5e-6
    )


def test_a_rotation_keeps_the_spectrum_at_any_strength(base):
    for strength in (-3.0, 0.3, 10.0):
        turned = adapt(base[0], [random_layer("none", (2, 3, 3), scale=0.5).scaled(strength)], {})
        assert torch.allclose(torch.linalg.svdvals(turned), torch.linalg.svdvals(base[0]), atol=1e-5)


def test_minus_one_undoes_a_rotation(base):
    layer = random_layer("none", (2, 3, 3), scale=0.5)
    assert torch.allclose(adapt(adapt(base[0], [layer], {}), [layer.scaled(-1)], {}), base[0], atol=1e-5)


def test_a_mix_of_unlike_forms_applies_as_one_weight(base):
    one, two = random_layer("lq", (2, 3, 3)), random_layer("svd", (2, 3, 3), seed=1)
    mixed = mix([(Adapter({"l": (one,)}), 0.7), (Adapter({"l": (two,)}), -0.4)])
    assert mixed.is_single_form()[0] is False
    expected = naive(base[0], [one.scaled(0.7), two.scaled(-0.4)], base[1])
    assert torch.allclose(adapt(base[0], mixed.layers["l"], base[1]).double(), expected, atol=3e-6)


def test_large_dimension_goes_factor_by_factor():
    w = torch.randn(8, 640, dtype=torch.float64)
    layer = random_layer("none", (8, 8, 10))
    assert torch.allclose(adapt(w, [layer], {}), naive(w, [layer], {}), atol=1e-10)


def test_half_precision_weights_are_computed_in_fp32(base):
    layer = random_layer("none", (2, 3, 3))
    half = base[0].to(torch.bfloat16)
    assert torch.equal(adapt(half, [layer], {}), adapt(half.float(), [layer], {}))


def test_a_misfit_names_both_sizes(base):
    with pytest.raises(SodaMixError, match=r"\(2, 2, 2\).*\(12, 18\)"):
        adapt(base[0], [random_layer("none", (2, 2, 2))], {})
