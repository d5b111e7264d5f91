"""Kronecker rotations against numpy's kron and a plain exponential series, and the rule of the factor sizes."""

import itertools
import math

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soda.kronecker import (
    MAX_FACTORS,
    OFFICIAL_SIZES,
    expm_factors,
    factor_sizes,
    kronecker,
    kronecker_sum,
    log_rotation,
    rotate,
    skew,
    triangle,
)

SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=4)
SEEDS = st.integers(0, 2**31)


def normal(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive_kron(factors):
    product = numpy.ones((1, 1))
    for factor in factors:
        product = numpy.kron(product, factor.numpy())
    return torch.from_numpy(product)


def naive_exp(a):
    """Scaling and squaring of the Taylor series, term by term."""
    squarings = 12
    a = a / 2**squarings
    total = term = torch.eye(len(a), dtype=torch.float64)
    for k in range(1, 12):
        term = term @ a / k
        total = total + term
    for _ in range(squarings):
        total = total @ total
    return total


def rotation(planes, rest, seed):
    """A rotation of the given angles, `rest` fixed axes, in a random orthonormal frame; its logarithm beside it."""
    n = 2 * len(planes) + rest
    frame = torch.linalg.qr(normal(n, n, seed=seed))[0]
    r, a = torch.eye(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for i, angle in enumerate(planes):
        x, y = 2 * i, 2 * i + 1
        r[x, x] = r[y, y] = math.cos(angle)
        r[y, x], r[x, y] = math.sin(angle), -math.sin(angle)
        a[y, x], a[x, y] = angle, -angle
    return frame @ r @ frame.mT, frame @ a @ frame.mT


@given(n=st.integers(1, 9), batch=st.integers(1, 3), seed=SEEDS)
def test_triangle_and_skew_are_inverse_row_by_row(n, batch, seed):
    numbers = normal(batch, n * (n - 1) // 2, seed=seed)
    a = skew(numbers, n)
    assert a.shape == (batch, n, n)
    for b in range(batch):
        rows = iter(numbers[b].tolist())
        for i in range(n):
            assert a[b, i, i] == 0
            for j in range(i + 1, n):
                value = next(rows)
                assert a[b, i, j] == value and a[b, j, i] == -value
    assert torch.equal(triangle(a), numbers)


@given(sizes=SIZES, seed=SEEDS)
def test_kronecker_is_numpys(sizes, seed):
    factors = [normal(n, n, seed=seed + j) for j, n in enumerate(sizes)]
    torch.testing.assert_close(kronecker(factors), naive_kron(factors), rtol=0, atol=1e-12)


@given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=3), rows=st.integers(1, 5), seed=SEEDS)
def test_rotate_is_the_product_with_the_dense_rotation(sizes, rows, seed):
    factors = [normal(n, n, seed=seed + j) for j, n in enumerate(sizes)]
    x = normal(rows, math.prod(sizes), seed=seed + 9)
    torch.testing.assert_close(rotate(x, factors), x @ naive_kron(factors).mT, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sizes", [(8, 8, 10), (4, 3, 5, 6), (257,), (2, 1, 150), (300, 1)])
def test_rotate_factor_by_factor_where_the_dimension_is_large(sizes):
    factors = [normal(n, n, seed=j) / math.sqrt(n) for j, n in enumerate(sizes)]
    x = normal(7, math.prod(sizes), seed=9)
    torch.testing.assert_close(rotate(x, factors), x @ naive_kron(factors).mT, rtol=0, atol=1e-11)


@pytest.mark.parametrize("sizes", [(2, 3, 4), (8, 8, 10)])
def test_rotate_a_batch_is_each_alone(sizes):
    factors = [normal(3, n, n, seed=j) for j, n in enumerate(sizes)]
    x = normal(3, 5, math.prod(sizes), seed=9)
    turned = rotate(x, factors)
    for b in range(3):
        expected = x[b] @ naive_kron([f[b] for f in factors]).mT
        torch.testing.assert_close(turned[b], expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("sizes", [(2, 3, 4), (8, 8, 10)])
def test_rotating_by_the_identity_changes_no_bit(sizes):
    x = normal(5, math.prod(sizes), seed=0).float()
    assert torch.equal(rotate(x, [torch.eye(n) for n in sizes]), x)


@given(sizes=SIZES, seed=SEEDS)
def test_exp_of_the_kronecker_sum_is_the_product_of_the_factors(sizes, seed):
    logs = [0.5 * normal(n * (n - 1) // 2, seed=seed + j) for j, n in enumerate(sizes)]
    factors = expm_factors(logs, sizes)
    for factor, log, n in zip(factors, logs, sizes, strict=True):
        torch.testing.assert_close(factor, naive_exp(skew(log, n)), rtol=0, atol=1e-11)
        torch.testing.assert_close(factor @ factor.mT, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
        assert torch.linalg.det(factor) == pytest.approx(1, abs=1e-10)
    dense = torch.linalg.matrix_exp(kronecker_sum(logs, sizes))
    torch.testing.assert_close(dense, naive_kron(factors), rtol=0, atol=1e-10)


def test_stored_numbers_of_any_size_give_a_rotation():
    for scale in (1e-30, 1e-3, 1.0, 30.0, 1000.0):
        (r,) = expm_factors([scale * normal(120, seed=1)], (16,))
        torch.testing.assert_close(r @ r.mT, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-9)


@given(n=st.integers(1, 12), scale=st.floats(1e-6, 1.0), seed=SEEDS)
def test_log_inverts_exp(n, scale, seed):
    a = skew(normal(n * (n - 1) // 2, seed=seed), n)
    a = a * (scale * 3.1 / max(float(torch.linalg.matrix_norm(a, 2)), 1e-9)) if n > 1 else a
    torch.testing.assert_close(log_rotation(naive_exp(a)), a, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rest", [0, 1, 3])
@pytest.mark.parametrize(
    "planes",
    [(), (0.7,), (0.7, 0.7), (0.7, 0.7, -0.7), (3.05, 3.05, 0.2), (3.1415, 1.0), (1e-9, 2.0), (0.0, 0.0, 3.14)],
    ids=str,
)
def test_log_of_repeated_and_large_angles(planes, rest):
    if not planes and not rest:
        rest = 2
    r, a = rotation(planes, rest, seed=len(planes) + 10 * rest)
    torch.testing.assert_close(log_rotation(r), a, rtol=0, atol=2e-9)


@pytest.mark.parametrize("rest", [0, 1, 2])
@pytest.mark.parametrize("angles", [(), (math.pi,), (0.5,), (math.pi - 1e-9, 3.0)], ids=str)
def test_log_at_half_turns(angles, rest):
    """At pi the logarithm is not unique; it must be skew, of no angle above pi, and exp must lead back."""
    r, _ = rotation((math.pi, *angles), rest, seed=3)
    a = log_rotation(r)
    assert torch.equal(a, -a.mT)
    assert float(torch.linalg.matrix_norm(a, 2)) <= math.pi + 1e-6
    torch.testing.assert_close(naive_exp(a), r, rtol=0, atol=1e-7)


def test_log_of_diagonal_half_turns():
    for signs in ([-1, -1], [-1, -1, 1], [-1, -1, -1, -1, 1], [1, -1, 1, -1]):
        r = torch.diag(torch.tensor(signs, dtype=torch.float64))
        torch.testing.assert_close(naive_exp(log_rotation(r)), r, rtol=0, atol=1e-9)


def test_log_of_a_batch_with_one_half_turn_is_each_alone():
    batch = torch.stack([rotation((0.4, 1.0), 1, 1)[0], rotation((math.pi, 1.0), 1, 2)[0], torch.eye(5).double()])
    together = log_rotation(batch)
    for r, a in zip(batch, together, strict=True):
        torch.testing.assert_close(log_rotation(r), a, rtol=0, atol=1e-12)
    assert not together[2].any()


def test_log_of_single_precision_rotations():
    """As training hands them over: orthogonal to 1e-7 only."""
    for seed in range(20):
        r, a = rotation((0.3, 1.1, 2.9, 3.1), seed % 2, seed)
        assert log_rotation(r.float()).dtype == torch.float32
        torch.testing.assert_close(log_rotation(r.float()).double(), a, rtol=0, atol=2e-5)
        half, _ = rotation((math.pi, math.pi, 0.4), seed % 2, seed)
        torch.testing.assert_close(naive_exp(log_rotation(half.float()).double()), half, rtol=0, atol=2e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_log_refuses_a_reflection(n):
    r = torch.eye(n, dtype=torch.float64)
    r[0, 0] = -1
    with pytest.raises(ValueError, match="reflection"):
        log_rotation(torch.stack([torch.eye(n).double(), r]))


def naive_sizes(dimension, count):
    divisors = [d for d in range(1, dimension + 1) if dimension % d == 0]
    found = [s for s in itertools.combinations_with_replacement(divisors, count) if math.prod(s) == dimension]
    return min(found, key=lambda sizes: (sum(sizes), sizes))


@given(dimension=st.integers(1, 400), count=st.integers(1, 4))
def test_factor_sizes_are_the_most_even_ones(dimension, count):
    sizes = factor_sizes(dimension, count)
    assert len(sizes) == count and math.prod(sizes) == dimension and list(sizes) == sorted(sizes)
    assert sizes == naive_sizes(dimension, count)


def test_factor_sizes_of_the_paper():
    table = {640: (8, 8, 10), 768: (6, 8, 16), 1280: (4, 16, 20), 2048: (4, 8, 64)}
    assert table == OFFICIAL_SIZES
    for dimension, sizes in table.items():
        assert factor_sizes(dimension, 3) == sizes
        assert math.prod(factor_sizes(dimension, 2)) == dimension


def test_factor_sizes_of_common_widths_and_primes():
    for dimension in (320, 512, 1024, 1536, 3072, 4096, 6144, 15360):
        for count in range(1, MAX_FACTORS + 1):
            sizes = factor_sizes(dimension, count)
            assert len(sizes) == count and math.prod(sizes) == dimension
    for prime in (2, 7, 127, 1279):
        assert factor_sizes(prime, 3) == (1, 1, prime)
    assert factor_sizes(1, 3) == (1, 1, 1)


@pytest.mark.parametrize("count", [0, -1, 6])
def test_factor_sizes_refuse_a_count_out_of_range(count):
    with pytest.raises(ValueError, match="1 to 5"):
        factor_sizes(64, count)


def test_factor_sizes_refuse_a_dimension_that_has_none():
    with pytest.raises(ValueError, match="dimension of 0 .*give 1 or more"):
        factor_sizes(0, 3)
