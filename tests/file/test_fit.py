"""What sketches say of a spectrum on another base, against the true error; and shapes that do not fit."""

import math

import pytest
import torch
from small_sd import adapter, base_weights

from soda.adapter import Layer
from soda.decomposition import decompose, spectral_change
from soda.fingerprint import relative_error, sketch
from soda.fit import misfit, rotation_only, spectrum_error
from soda.kronecker import factor_sizes
from soda.mixing import mix


def case(seed):
    """(estimated, true) relative error of D for a random layer on a perturbed base."""
    g = torch.Generator().manual_seed(seed)
    kind = ("lq", "svd", "qr")[seed % 3]
    out, width = (int(n) for n in torch.randint(16, 97, (2,), generator=g))
    weight = torch.randn(out, width, generator=g)
    delta = torch.randn(min(out, width), generator=g)
    noise = 10 ** float(-3 * torch.rand((), generator=g)) * torch.randn(out, width, generator=g)
    other = weight + noise
    here = decompose(other, kind)
    d0, d1 = spectral_change(decompose(weight, kind), delta, weight), spectral_change(here, delta, other)
    layer = Layer(kind, delta, tuple(torch.zeros(n * (n - 1) // 2) for n in factor_sizes(width, 2)), sketch(d0))
    return spectrum_error([(layer, here)]), float((d1 - d0).norm() / d0.norm())


def test_the_estimate_is_good_to_40_percent_over_three_decades():
    ratios = [estimated / true for estimated, true in map(case, range(300))]
    within = sum(0.6 < ratio < 1.4 for ratio in ratios)
    assert within >= 0.95 * len(ratios) and min(ratios) > 0.5 and max(ratios) < 1.7
    assert sum(map(math.log, ratios)) / len(ratios) == pytest.approx(0, abs=0.05)
    true = [case(seed)[1] for seed in range(60)]
    assert min(true) < 0.01 and max(true) > 0.5


def test_many_layers_average_out():
    """20 layers together: within 15 %."""
    g = torch.Generator().manual_seed(0)
    changes = torch.randn(400, 40, 60, generator=g)
    noise = 0.1 * torch.randn(400, 40, 60, generator=g)
    before, after = sketch(changes), sketch(changes + noise)
    for start in range(0, 400, 20):
        group = slice(start, start + 20)
        true = float(noise[group].norm() / changes[group].norm())
        assert relative_error(zip(after[group], before[group], strict=True)) == pytest.approx(true, rel=0.15)


def test_layers_without_a_sketch_say_nothing():
    basis = decompose(torch.eye(4), "lq")
    layer = Layer("lq", torch.ones(4), (torch.zeros(6),))
    assert relative_error([]) is None and spectrum_error([(layer, basis)]) is None
    assert relative_error([(torch.zeros(8, 8), torch.zeros(8, 8))]) is None


def test_a_mix_has_the_sketch_of_its_change():
    """Linear in delta: sketch(D(sum w_i delta_i)) = sum w_i sketch(D(delta_i))."""

    weights = dict(list(base_weights().items())[:8])
    for kind in ("lq", "svd", "qr"):
        mixed = mix(
            [(adapter(weights, kind, 1), 0.7), (adapter(weights, kind, 2), -0.4), (adapter(weights, kind, 3), 1)]
        )
        terms = ((term, decompose(weights[name], kind)) for name, (term,) in mixed.layers.items())
        assert spectrum_error(terms) < 1e-5


def test_rotation_only_keeps_form_and_rotation():
    layer = Layer("svd", torch.ones(4), (torch.ones(6),), torch.ones(8, 8))
    still = Layer("none", None, (torch.ones(6),))
    ((first,), (second,)) = rotation_only({"a": (layer,), "b": (still,)}).values()
    assert first.decomposition == "svd" and not first.delta.any() and first.sketch is None
    assert torch.equal(first.logs[0], layer.logs[0]) and second is still


@pytest.mark.parametrize(
    ("kind", "numbers", "shape", "message"),
    [
        ("lq", 4, (4, 6), None), ("qr", 4, (6, 4), None), ("none", None, (9, 6), None),
        ("lq", 4, (4, 6, 1, 1), "4 dimensions"), ("lq", 4, (4, 5), "inputs of width 6"),
        ("qr", 4, (4, 6), "outputs of width 6"), ("svd", 5, (4, 6), "5 numbers"),
    ],
)  # fmt: skip
def test_misfits(kind, numbers, shape, message):
    delta = None if numbers is None else torch.zeros(numbers)
    reason = misfit([Layer(kind, delta, (torch.zeros(1), torch.zeros(3)))], shape)
    assert reason is None if message is None else message in reason
