"""A change of the spectrum in 8 and 16 bits: how far it is off, and what it must not do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soda.compressed import Compressed

KINDS = {torch.int8: 127, torch.int16: 32767}
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 200))


def gaussian(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compressed(change, kind):
    (alone,) = Compressed.each(change[None], kind)
    return alone


def back(change, shape, kind=torch.int8):
    weight = torch.zeros(shape, dtype=torch.float64)
    compressed(change, kind).add_to(weight)
    return weight


@given(SHAPES, st.integers(0, 1000), st.floats(-30, 3), st.integers(0, 5), st.sampled_from(list(KINDS)))
def test_each_number_is_off_by_half_a_step_at_most(shape, seed, exponent, below, kind):
    d = gaussian(shape, seed).double() * 10**exponent
    found = back(d, (shape[0] + below, shape[1]), kind)
    assert not found[shape[0] :].any()
    blocks = -(-shape[1] // 64)
    for start in range(0, shape[1], -(-shape[1] // blocks)):
        here = slice(start, start + -(-shape[1] // blocks))
        step = d[:, here].abs().amax(1, keepdim=True) / KINDS[kind]
        off = (found[: shape[0], here] - d[:, here]).abs()
        assert (off <= 0.5 * step * (1 + 2**-6)).all()  # bf16 rounds the scale, up


@pytest.mark.parametrize(("kind", "limit", "bytes_each"), [(torch.int8, 6.5e-3, 1.04), (torch.int16, 2.6e-5, 2.04)])
def test_a_gaussian_change_is_off_by_a_known_share(kind, limit, bytes_each):
    d = gaussian((640, 1280))
    assert limit / 2 < (back(d, d.shape, kind) - d).norm() / d.norm() < limit
    assert compressed(d, kind).data.nbytes <= bytes_each * d.numel()


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-40])
def test_what_is_too_small_to_keep_becomes_zero_and_nothing_becomes_nan(tiny):
    d = torch.full((2, 70), tiny)
    d[1] = 1.0
    found = back(d, d.shape)
    assert found.isfinite().all() and found[0].abs().max() <= 2e-40
    assert torch.allclose(found[1], torch.ones(70, dtype=torch.float64), rtol=5e-3)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("columns", [64, 70])
def test_it_is_added_to_half_precision_weights_with_one_rounding(columns, kind):
    d, weight = gaussian((3, columns)) * 1e-4, gaussian((3, columns), 1).half()
    exact = weight.float()
    change = compressed(d, kind)
    change.add_to(exact, 0.5)
    change.add_to(weight, 0.5)
    assert torch.equal(weight, exact.half())


def test_strength_scales_and_adds():
    d, weight = gaussian((3, 65)), gaussian((5, 65), 1)
    before = weight.clone()
    compressed(d, torch.int8).add_to(weight, -0.5)
    assert torch.allclose(weight[:3], before[:3] - 0.5 * d, atol=0.02)
    assert torch.equal(weight[3:], before[3:])


@given(SHAPES, st.integers(2, 5), st.sampled_from(list(KINDS)))
def test_several_at_once_are_those_alone(shape, count, kind):
    changes = torch.stack([gaussian(shape, seed) * 10.0**seed for seed in range(count)])
    for change, together in zip(changes, Compressed.each(changes, kind), strict=True):
        alone = compressed(change, kind)
        assert torch.equal(alone.data, together.data) and alone[1:] == together[1:]
