"""Hashes tell bases apart; sketches measure how wrong a change is."""

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
