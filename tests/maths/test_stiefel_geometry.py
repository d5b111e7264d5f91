"""The way along St(n, m) and back onto it, against singular values, eigen-angles and the matrix exponential."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from soda.stiefel.geometry import MAX_STEP, RETRACTIONS, hold, hold_skew, largest_skew, move, tangent_gradients
from soda.stiefel.newton_schulz import newton_schulz, polar, shrinkage
from soda.stiefel.scratch import Scratch


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def frames(count, n, m, seed=0, dtype=torch.float64):
    return torch.linalg.qr(noise(count, n, m, seed=seed)).Q.to(dtype)


def skew(count, n, length, seed=0):
    a = noise(count, n, n, seed=seed)
    a = a - a.mT
    return length * a / torch.linalg.matrix_norm(a, 2)[:, None, None].clamp_min(1e-30)


def normal(x, length, seed=0):
    """Steps out of the span of X, of spectral norm `length`."""
    zeta = noise(*x.shape, seed=seed)
    zeta = zeta - x @ (x.mT @ zeta)
    return length * zeta / torch.linalg.matrix_norm(zeta, 2)[:, None, None]


def svd_polar(m):
    u, _, vt = torch.linalg.svd(m, full_matrices=False)
    return u @ vt


def off_manifold(x):
    return float((x.double().mT @ x.double() - torch.eye(x.shape[-1])).abs().max())


shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(0, 5)).map(lambda t: (t[0], t[1] + t[2], t[1]))


@given(shape=shapes, error=st.floats(0, 0.5), seed=st.integers(0, 2**20))
def test_polar_is_the_nearest_matrix_with_orthonormal_columns(shape, error, seed):
    """M^T M - I of any sign up to its bound, and a matrix that follows."""
    count, n, m = shape
    q = frames(count, m, m, seed + 1)
    s = (2 * torch.rand(count, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1) * error
    matrix = frames(count, n, m, seed) @ (q * (1 + s).sqrt()[:, None]) @ q.mT
    follow = noise(count, n, m, seed=seed + 2)
    expected = follow @ ((q * (1 + s).rsqrt()[:, None]) @ q.mT)
    torch.testing.assert_close(polar(matrix), svd_polar(matrix), rtol=0, atol=1e-13)
    out = torch.empty_like(matrix)
    newton_schulz([matrix.clone()], [error], [out], [follow], Scratch())
    torch.testing.assert_close(out, svd_polar(matrix), rtol=0, atol=1e-13)
    torch.testing.assert_close(follow, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order, correction", [(1, [-1 / 2]), (2, [-1 / 2, 3 / 8])])
@given(error=st.floats(1e-6, 0.7), share=st.floats(-1, 1))
def test_a_step_shrinks_by_what_it_says(order, correction, error, share):
    """Eigenvalue by eigenvalue: of M (I + c1 S + c2 S^2), which start the series of (I + S)^(-1/2)."""
    s = share * error
    after = (1 + s) * (1 + sum(c * s**power for power, c in enumerate(correction, 1))) ** 2 - 1
    assert abs(after) <= shrinkage(order, error) * s**2 + 1e-15


def spread(count, n, error, dtype):
    """Matrices with eigenvalues of M^T M - I all over [-error, error]."""
    s = torch.linspace(-error, error, n, dtype=torch.float64)
    return (frames(count, n, n, 1) * (1 + s).sqrt() @ frames(count, n, n, 2).mT).to(dtype)


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 5e-7), (torch.float64, 1e-14)])
@pytest.mark.parametrize("error", [0.0, 1e-8, 1e-6, 3e-4, 4e-3, 0.02, 0.125, 0.5, 0.625])
@pytest.mark.parametrize("looks", [True, False])
def test_steps_of_the_right_order_end_at_rounding(error, dtype, rounding, looks, monkeypatch):
    """Also where S is not looked at, as on a GPU, and the bound alone says which steps there are."""
    if not looks:
        monkeypatch.setattr("soda.stiefel.newton_schulz._centre", lambda s, error, tolerance: (1.0, error, error))
    small, large = spread(3, 4, error, dtype), spread(2, 9, error / 3, dtype)
    outs = [torch.empty_like(small), torch.empty_like(large)]
    newton_schulz([small.clone(), large.clone()], [error, error / 3], outs, [None, None], Scratch())
    for matrix, out in zip((small, large), outs, strict=True):
        torch.testing.assert_close(out.double(), svd_polar(matrix.double()), rtol=0, atol=rounding)


@pytest.mark.parametrize("error, products", [(1e-4, 2), (2e-3, 3), (0.015, 4), (0.07, 5), (0.16, 6)])
def test_no_more_products_than_needed(error, products):
    """In fp32: order 1, 2, then 1 after 1, 2 after 1 and so on. A bound of 0.5 costs nothing where S is small."""
    counted = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counted.append(function.name() if "bmm" in function.name() else None)
            return function(*args, **(kwargs or {}))

    matrix = spread(2, 6, error, torch.float32)
    with Products():
        polar(matrix)
    assert sum(name is not None for name in counted) == products


@pytest.mark.parametrize("m", [12, 7])
def test_a_step_along_the_manifold_takes_products_for_what_differs_only(m, monkeypatch):
    """M^T M = I + xi^T xi with alike eigenvalues: order 1 ends at rounding where the length of S says order 2."""
    counted = []
    monkeypatch.setattr(torch.Tensor, "baddbmm_", lambda *args, _old=torch.Tensor.baddbmm_, **names: counted.append(1)
                        or _old(*args, **names))  # fmt: skip
    s = 4e-3 + 4e-4 * torch.linspace(-1, 1, m, dtype=torch.float64)
    turn = frames(1, m, m)
    matrix = (frames(2, 12, m, 1) @ ((turn * (1 + s).sqrt()) @ turn.mT)).float()
    follow = noise(2, 12, m, seed=2, dtype=torch.float32)
    expected = follow.double() @ ((turn * (1 + s).rsqrt()) @ turn.mT)
    out = torch.empty_like(matrix)
    newton_schulz([matrix.clone()], [0.25], [out], [follow], Scratch())
    assert len(counted) == 1 and 0.75 * float(s.square().max()) > 1e-5
    torch.testing.assert_close(out.double(), svd_polar(matrix.double()), rtol=0, atol=3e-7)
    torch.testing.assert_close(follow.double(), expected, rtol=0, atol=2e-6)


@given(low=st.floats(-0.6, 0.6), high=st.floats(-0.6, 0.6), seed=st.integers(0, 2**20))
def test_unlike_matrices_of_one_bank_all_end_at_rounding(low, high, seed):
    """One middle for all: also where most eigenvalues are at one end and some at the other."""
    s = torch.full((3, 6), low, dtype=torch.float64)
    s[1], s[2, 0] = high, high
    matrix = frames(3, 6, 6, seed) * (1 + s).sqrt()[:, None] @ frames(3, 6, 6, seed + 1).mT
    torch.testing.assert_close(polar(matrix, 0.6), svd_polar(matrix), rtol=0, atol=1e-13)


def test_polar_takes_single_matrices_and_leaves_them():
    matrix = 1.05 * frames(1, 5, 3)[0]
    result = polar(matrix)
    assert result.shape == (5, 3) and off_manifold(result) < 1e-14
    assert off_manifold(matrix) > 0.1


@pytest.mark.parametrize(
    "retraction, angle",
    [("polar", math.atan), ("cayley", lambda theta: 2 * math.atan(theta / 2)), ("exp", lambda theta: theta)],
)
@given(theta=st.floats(1e-3, 0.45), n=st.integers(2, 7), seed=st.integers(0, 2**20))
def test_how_far_an_eigen_angle_turns(retraction, angle, theta, n, seed):
    frame = frames(1, n, n, seed)
    xi = torch.zeros(1, n, n, dtype=torch.float64)
    xi[:, 0, 1], xi[:, 1, 0] = -theta, theta
    x = frames(1, n, n, seed + 1)
    start = x.clone()
    move([x], [frame @ xi @ frame.mT], [None], [None], retraction, Scratch())
    expected = torch.eye(n, dtype=torch.float64)[None].clone()
    c, s = math.cos(angle(theta)), math.sin(angle(theta))
    expected[:, :2, :2] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    torch.testing.assert_close(x, start @ frame @ expected @ frame.mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("retraction", RETRACTIONS)
@given(shape=shapes.filter(lambda s: s[1] > s[2]), length=st.floats(1e-4, MAX_STEP), seed=st.integers(0, 2**20))
def test_a_move_is_its_formula_and_keeps_position_and_momentum_apart(retraction, shape, length, seed):
    """X^T X = I and X^T V = 0 go on; V along the step keeps its length when nothing turns within the span."""
    count, n, m = shape
    x, xi = frames(count, n, m, seed), skew(count, m, length, seed + 1)
    zeta, v = normal(x, length, seed + 2), normal(x, 3.0, seed + 3)
    eye = torch.eye(m, dtype=torch.float64)
    tau = {
        "polar": eye + xi,
        "cayley": torch.linalg.inv(eye - xi / 2) @ (eye + xi / 2),
        "exp": torch.linalg.matrix_exp(torch.cat([xi, xi]))[:count],  # of one alone it is wrong by 2e-10
    }[retraction]
    x1 = x @ tau
    x2, v2 = x1 + zeta @ x1.mT @ x1, v - x1 @ zeta.mT @ v
    values, vectors = torch.linalg.eigh(x2.mT @ x2)
    root = (vectors * values.rsqrt()[:, None]) @ vectors.mT
    x0, along = x.clone(), 2 * zeta
    before = along.norm()
    move([x], [xi], [zeta], [v], retraction, Scratch())
    torch.testing.assert_close(x, x2 @ root, rtol=0, atol=1e-13)
    torch.testing.assert_close(v, v2 @ root, rtol=0, atol=1e-12)
    assert (x.mT @ v).abs().max() < 1e-13
    move([x0], [torch.zeros_like(xi)], [zeta], [along], retraction, Scratch())
    torch.testing.assert_close(along.norm(), before, rtol=1e-13, atol=0)


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_a_move_removes_drift(retraction):
    x = frames(2, 6, 6) + 1e-3 * noise(2, 6, 6, seed=1)
    for _ in range(3):  # the square of it stays at least
        move([x], [skew(2, 6, 0.01)], [None], [None], retraction, Scratch())
    assert off_manifold(x) < 1e-14


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_sizes_that_move_together_move_as_if_alone(retraction):
    xs = [frames(2, n, m, n) for n, m in ((3, 3), (7, 4), (1, 1), (9, 9), (6, 4))]
    xis = [skew(2, x.shape[-1], 0.1, i) for i, x in enumerate(xs)]
    zetas = [None if x.shape[-2] == x.shape[-1] else normal(x, 0.2, i) for i, x in enumerate(xs)]
    vs = [None if zeta is None else 3 * zeta for zeta in zetas]
    alone = copy.deepcopy(list(zip(xs, xis, zetas, vs, strict=True)))
    move(xs, xis, zetas, vs, retraction, Scratch())
    for (x, xi, zeta, v), together, momentum in zip(alone, xs, vs, strict=True):
        move([x], [xi], [zeta], [v], retraction, Scratch())
        assert torch.equal(x, together) and (v is None or torch.equal(v, momentum))


@given(shape=shapes, a=st.sampled_from([0.5, 0.0, -1.0, 0.9]), seed=st.integers(0, 2**20))
def test_the_tangent_gradient_represents_the_gradient_in_the_metric(shape, a, seed):
    """<(Z, W), Q> in the metric tr Q^T (I - a X X^T) Q is tr G^T Q for every tangent Q."""
    count, n, m = shape
    x, g = frames(count, n, m, seed), noise(count, n, m, seed=seed + 1)
    (z,), (w,) = tangent_gradients([x], [g], a, Scratch())
    assert torch.equal(z, -z.mT) and (w is None) == (n == m)
    gradient = x @ z if w is None else x @ z + w
    q = x @ skew(count, m, 1.0, seed + 2)
    if n > m:
        q = q + normal(x, 1.0, seed + 3)
    metric = (gradient * (q - a * x @ (x.mT @ q))).sum()
    torch.testing.assert_close(metric, (g * q).sum(), rtol=1e-10, atol=1e-12)


@given(shape=shapes, length=st.floats(1e-6, 1e6), seed=st.integers(0, 2**20))
def test_a_held_step_is_shorter_and_points_the_same_way(shape, length, seed):
    step = noise(*shape, seed=seed)
    step = length * step / torch.linalg.matrix_norm(step, keepdim=True)
    held = hold(step.clone())
    factor = (held * step).sum((1, 2)) / (step * step).sum((1, 2))
    torch.testing.assert_close(held, factor[:, None, None] * step, rtol=1e-12, atol=0)
    gram = torch.linalg.matrix_norm(step.mT @ step)
    torch.testing.assert_close(factor, (MAX_STEP / gram.sqrt()).clamp(max=1.0), rtol=1e-12, atol=0)
    assert torch.linalg.matrix_norm(held, 2).max() <= MAX_STEP * (1 + 1e-12)


@given(n=st.integers(1, 64), entry=st.floats(1e-4, 1.0), ends=st.booleans(), seed=st.integers(0, 2**20))
def test_entries_bound_a_skew_step(n, entry, ends, seed):
    """Also at the ends of the range, where the largest of all are; a step that cannot need it is not held."""
    a = 2 * torch.rand(4, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
    xi = (a.sign() if ends else a).triu(1) * entry
    xi = xi - xi.mT
    assert torch.linalg.matrix_norm(xi, 2).max() <= largest_skew(entry, n) * (1 + 1e-12)
    alike = torch.full((n, n), entry, dtype=torch.float64).triu(1)
    largest = torch.linalg.matrix_norm(alike - alike.mT, 2)
    torch.testing.assert_close(float(largest), largest_skew(entry, n), rtol=1e-12, atol=1e-15)
    for step in (xi, (alike - alike.mT)[None]):
        torch.testing.assert_close(hold_skew(step.clone(), entry), hold(step.clone()), rtol=1e-12, atol=0)


def test_absurd_steps_are_held_too():
    """Entries whose squares overflow, none at all, and a long and a short one in one bank."""
    step = torch.stack([torch.full((3, 3), 1e18), torch.full((3, 3), 3e38), torch.zeros(3, 3), 1e-3 * torch.eye(3)])
    held = hold(step.clone())
    assert held.isfinite().all() and (torch.linalg.matrix_norm(held, 2) <= MAX_STEP * 1.0001).all()
    assert held[0].norm() > 0.4 and not held[2].any()
    torch.testing.assert_close(held[3], step[3], rtol=1e-6, atol=0)
