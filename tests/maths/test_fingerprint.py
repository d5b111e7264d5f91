"""Hashes tell bases apart; sketches measure how wrong a change is."""

import math

import pytest
import torch

from soda.fingerprint import base_hash, sketch, tensor_hash


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_hash_knows_values_and_shape_not_dtype_or_layout():
    half = normal(4, 6).half()
    assert tensor_hash(half) == tensor_hash(half.float()) == tensor_hash(half.T.contiguous().T)
    assert len({tensor_hash(t) for t in (half, half.T, half.reshape(6, 4), half + 1, half.flatten())}) == 5


def test_a_base_is_its_names_and_weights_in_any_order():
    a, b = normal(3, 3), normal(3, 3, seed=1)
    assert base_hash({"a": a, "b": b}) == base_hash({"b": b, "a": a}) != base_hash({"a": b, "b": a})


def test_a_sketch_is_linear_and_batched():
    d, e = normal(30, 50), normal(30, 50, seed=1)
    assert torch.allclose(sketch(2 * d - 3 * e), 2 * sketch(d) - 3 * sketch(e), atol=1e-4)
    assert torch.allclose(sketch(torch.stack([d, e]))[1], sketch(e), atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 60), (640, 640), (200, 7)])
def test_its_norm_estimates_that_of_the_change(shape):
    ratios = [sketch(d).norm() / d.norm() for d in (normal(*shape, seed=s) for s in range(50))]
    assert sum(r * r for r in ratios) / 50 == pytest.approx(1, abs=0.5)  # 7 columns make a wide spread


def test_it_estimates_a_relative_error():
    d = normal(200, 300)
    for error in (0.01, 0.1, 1.0):
        wrong = d + error * normal(200, 300, seed=7)
        assert 0.5 < ((sketch(wrong) - sketch(d)).norm() / sketch(d).norm()) / error < 2.0


def test_its_numbers_are_frozen():
    """They are part of the file format."""
    unit = torch.zeros(5, 4)
    unit[2, 3] = 1.0
    assert torch.allclose(sketch(unit)[0, :3], torch.tensor(FROZEN), atol=1e-6)


FROZEN = [-0.0086658, 0.0444404, 0.234817]


def split_mix(counter):
    """SplitMix64 of one counter, in Python's unbounded integers."""
    mask = (1 << 64) - 1
    x = (counter * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def naive_gaussian(width, seed):
    count = 8 * width
    uniform = [((split_mix(i + (seed << 40)) >> 11) + 0.5) / 2**53 for i in range(1, 2 * count + 1)]
    numbers = [math.sqrt(-2 * math.log(uniform[i])) * math.cos(2 * math.pi * uniform[count + i]) for i in range(count)]
    return torch.tensor(numbers, dtype=torch.float64).reshape(8, width)


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (40, 3)])
def test_its_definition_written_out(shape):
    d = normal(*shape)
    expected = naive_gaussian(shape[0], 1) @ d.double() @ naive_gaussian(shape[1], 2).mT / 8
    assert torch.allclose(sketch(d).double(), expected, atol=1e-5)


def test_its_error_is_within_the_band():
    """10 to 40 %: dense changes at the good end, changes of rank 1 at the bad one (1 standard deviation)."""
    dense = torch.stack([sketch(d).norm() / d.norm() for d in (normal(320, 640, seed=s) for s in range(60))])
    assert (dense - 1).abs().max() < 0.4 and dense.std() < 0.15
    outer = [torch.outer(normal(320, seed=s), normal(640, seed=s + 100)) for s in range(60)]
    thin = torch.stack([sketch(d).norm() / d.norm() for d in outer])
    assert thin.std() < 0.4 and abs(thin.square().mean().sqrt() - 1) < 0.25
