"""StiefelAdam and StiefelSGD against the paper's equations for one matrix in float64, and what follows of them."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soda.kronecker import log_rotation
from soda.stiefel import StiefelAdam, StiefelSGD


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def frames(count, n, m, seed=0, dtype=torch.float64):
    q = torch.linalg.qr(noise(count, n, m, seed=seed)).Q
    if n == m:
        q[..., 0] *= torch.linalg.det(q).sign()[:, None]
    return q.to(dtype)


def off_manifold(x):
    x = x.detach().double()
    return float((x.mT @ x - torch.eye(x.shape[-1])).abs().max())


def held(step):
    size = float((step.T @ step).norm()) ** 0.5
    return step * min(1.0, 0.5 / size) if size else step


def turned(x, xi, retraction):
    eye = torch.eye(len(xi), dtype=torch.float64)
    if retraction == "polar":
        return x @ (eye + xi)
    if retraction == "cayley":
        return x @ torch.linalg.inv(eye - xi / 2) @ (eye + xi / 2)
    values, vectors = torch.linalg.eigh(-1j * xi)
    return x @ ((vectors * torch.exp(1j * values)) @ vectors.mH).real


def retracted(x, xi, zeta, v, retraction):
    """The flow of position and momentum, then both times the inverse root of X^T X."""
    x1 = turned(x, xi, retraction)
    x2, v = x1 + zeta @ (x1.T @ x1), v - x1 @ (zeta.T @ v)
    values, vectors = torch.linalg.eigh(x2.T @ x2)
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    return x2 @ root, v @ root


def plain_adam(x, gradients, lr, betas, eps, a, retraction):
    (b1, b2), b = betas, a / (a - 1)
    y = p = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    v = q = torch.zeros_like(x)
    for t, g in enumerate(gradients, 1):
        z = (1 - b) / 2 * (x.T @ g - g.T @ x)
        w = g - x @ x.T @ g
        y, p = b1 * y - (1 - b1) * z, b2 * p + (1 - b2) * z * z
        xi = held(lr / (1 - b1**t) * y / ((p / (1 - b2**t)).sqrt() + eps))
        v, q = b1 * v + (3 * a - 2) / 2 * v @ xi - (1 - b1) * w, b2 * q + (1 - b2) * w * w
        zeta = lr / (1 - b1**t) * v / ((q / (1 - b2**t)).sqrt() + eps)
        x, v = retracted(x, xi, held(zeta - x @ x.T @ zeta), v, retraction)
    return x


def plain_sgd(x, gradients, lr, momentum, dampening, a, retraction):
    b = a / (a - 1)
    y, v = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64), torch.zeros_like(x)
    for g in gradients:
        z = (1 - b) / 2 * (x.T @ g - g.T @ x)
        w = g - x @ x.T @ g
        v = momentum * v + (3 * a - 2) / 2 * v @ held(lr * y) - (1 - dampening) * w
        y = momentum * y - (1 - dampening) * z
        x, v = retracted(x, held(lr * y), held(lr * v), v, retraction)
    return x


retractions = st.sampled_from(["polar", "cayley", "exp"])
sizes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(0, 4))
metrics = st.sampled_from([0.5, 0.0, -0.7])


@given(size=sizes, lr=st.floats(1e-4, 0.3), b1=st.floats(0, 0.95), b2=st.floats(0.5, 0.999), a=metrics,
       retraction=retractions, seed=st.integers(0, 2**20))  # fmt: skip
def test_adam_is_its_equations(size, lr, b1, b2, a, retraction, seed):
    """The largest rates reach the limit on the step."""
    count, m, more = size
    start = frames(count, m + more, m, seed)
    gradients = [noise(*start.shape, seed=seed + t) for t in range(1, 6)]
    bank = torch.nn.Parameter(start.clone())
    optimizer = StiefelAdam([bank], lr=lr, betas=(b1, b2), eps=1e-6, a=a, retraction=retraction)
    for gradient in gradients:
        bank.grad = gradient
        optimizer.step()
    for i in range(count):
        expected = plain_adam(start[i], [g[i] for g in gradients], lr, (b1, b2), 1e-6, a, retraction)
        torch.testing.assert_close(bank[i].detach(), expected, rtol=0, atol=1e-11)


@given(b1=st.floats(0, 0.99), b2=st.floats(0, 0.9999), growth=st.floats(0.5, 2.0), steps=st.integers(1, 60),
       change=st.booleans(), seed=st.integers(0, 2**20))  # fmt: skip
def test_no_entry_of_an_adam_step_exceeds_its_bound(b1, b2, growth, steps, change, seed):
    """Gradients that grow or fade, by chance or as the bound is reached, and betas that change on the way."""
    rule = StiefelAdam([torch.nn.Parameter(frames(2, 4, 4))], lr=1e-3, betas=(b1, b2), eps=1e-12)
    (group,), x = rule.param_groups, rule.param_groups[0]["params"][0].detach()
    moments = {name: torch.zeros(2, 4, 4, dtype=torch.float64) for name in rule.MOMENTS}
    counters = dict(rule.COUNTERS)
    for t in range(steps):
        if change and t == steps // 2:
            group["betas"] = (0.5 * b1, 0.9 * b2)
        counters = rule._count(counters, group)
        gradient = growth**t * (noise(2, 4, 4, seed=seed + t) if seed % 2 else noise(2, 4, 4, seed=seed))
        (xi,), _, entry = rule._tangents([x], [x @ gradient], [moments], counters, group)
        assert xi.abs().max() <= entry * (1 + 1e-12)


def test_the_bound_on_an_adam_step_is_reached():
    """By gradients that grow by b2 / b1 a step, when all others are forgotten."""
    b1, b2, lr = 0.6, 0.9, 1e-3
    x = frames(1, 3, 3)[0]
    rule = StiefelAdam([torch.nn.Parameter(x.clone())], lr=lr, betas=(b1, b2), eps=1e-12)
    moments = {name: torch.zeros(1, 3, 3, dtype=torch.float64) for name in rule.MOMENTS}
    counters, g = dict(rule.COUNTERS), noise(1, 3, 3)
    for t in range(40):
        counters = rule._count(counters, rule.param_groups[0])
        (xi,), _, entry = rule._tangents([x[None]], [(b2 / b1) ** t * g], [moments], counters, rule.param_groups[0])
        off_diagonal = xi[0][~torch.eye(3, dtype=torch.bool)].abs()
        torch.testing.assert_close(off_diagonal, torch.full_like(off_diagonal, entry), rtol=1e-9, atol=0)
    assert entry > 1.2 * lr


@given(size=sizes, lr=st.floats(1e-4, 0.3), momentum=st.floats(0, 0.95), dampening=st.floats(0, 1), a=metrics,
       retraction=retractions, seed=st.integers(0, 2**20))  # fmt: skip
def test_sgd_is_its_equations(size, lr, momentum, dampening, a, retraction, seed):
    count, m, more = size
    start = frames(count, m + more, m, seed)
    gradients = [noise(*start.shape, seed=seed + t) for t in range(1, 6)]
    bank = torch.nn.Parameter(start.clone())
    optimizer = StiefelSGD([bank], lr, momentum, dampening, a=a, retraction=retraction)
    for gradient in gradients:
        bank.grad = gradient
        optimizer.step()
    for i in range(count):
        expected = plain_sgd(start[i], [g[i] for g in gradients], lr, momentum, dampening, a, retraction)
        torch.testing.assert_close(bank[i].detach(), expected, rtol=0, atol=1e-11)


def test_ten_thousand_steps_in_fp32_stay_on_the_manifold():
    """Noise around a pull to a target, as training is, at the upper end of ordinary rates."""
    starts = [frames(2, n, m, n, torch.float32) for n, m in ((4, 4), (16, 16), (12, 5))]
    banks = [torch.nn.Parameter(start.clone()) for start in starts]
    targets = [frames(2, *bank.shape[1:], 1, torch.float32) for bank in banks]
    optimizer = StiefelAdam([{"params": banks[:2]}, {"params": banks[2:], "lr": 1e-3}], lr=2e-2)
    random = torch.Generator().manual_seed(2)
    for _ in range(10_000):
        for bank, target in zip(banks, targets, strict=True):
            bank.grad = torch.randn(bank.shape, generator=random).add_(bank.detach() - target)
        optimizer.step()
    for bank, start in zip(banks, starts, strict=True):
        assert off_manifold(bank) <= 1e-6
        assert (bank - start).norm() > 0.5
    normal = optimizer.state[banks[2]]["normal_momentum"]
    assert (banks[2].mT @ normal).abs().max() <= 1e-6


@pytest.mark.parametrize("optimizer", [StiefelAdam, StiefelSGD])
@pytest.mark.parametrize("n, m", [(6, 6), (9, 4), (5, 1)])
def test_it_finds_the_procrustes_solution(optimizer, n, m):
    """min |A X - B| over St(n, m) with B = A X*: a convex valley around X*, entered from nearby."""
    factor, target = noise(2, 3 * n, n) / (3 * n) ** 0.5, frames(2, n, m, 1)
    start = target + 0.3 * noise(2, n, m, seed=2) / n**0.5
    u, _, vt = torch.linalg.svd(start, full_matrices=False)
    x = torch.nn.Parameter(u @ vt)
    rule = optimizer([x], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(rule, 400)
    for _ in range(400):
        rule.zero_grad()
        (factor @ (x - target)).square().sum().backward()
        rule.step()
        schedule.step()
    assert (x - target).norm() < 1e-3
    assert off_manifold(x) < 1e-13


@pytest.mark.parametrize("optimizer", [StiefelAdam, StiefelSGD])
def test_rotating_the_world_rotates_the_run(optimizer):
    """X -> O X and G -> O G: Z stays, so that for square X the whole run turns along; for SGD also St(n, m)."""
    for n, m in ((5, 5),) if optimizer is StiefelAdam else ((5, 5), (7, 3)):
        turn, start = frames(1, n, n, 1)[0], frames(2, n, m)
        one, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(turn @ start)
        rules = [optimizer([x], lr=0.03) for x in (one, other)]
        for seed in range(6):
            one.grad = noise(2, n, m, seed=seed)
            other.grad = turn @ one.grad
            for rule in rules:
                rule.step()
        torch.testing.assert_close(other.detach(), turn @ one.detach(), rtol=0, atol=1e-12)


def test_adam_does_not_feel_the_scale_of_the_loss():
    for n, m in ((5, 5), (7, 3)):
        banks = [torch.nn.Parameter(frames(2, n, m)) for _ in range(2)]
        rules = [StiefelAdam([bank], lr=0.03, eps=1e-30) for bank in banks]
        for seed in range(6):
            for bank, rule, scale in zip(banks, rules, (1.0, 4096.0), strict=True):
                bank.grad = scale * noise(2, n, m, seed=1 + seed)
                rule.step()
        assert torch.equal(banks[0], banks[1])


@pytest.mark.parametrize("optimizer", [StiefelAdam, StiefelSGD])
@pytest.mark.parametrize("n, m", [(5, 5), (7, 3)])
def test_a_gradient_across_the_manifold_does_not_move_it(optimizer, n, m):
    """X S with S symmetric is normal to the manifold; 0 must not become 0 / 0 either."""
    x = torch.eye(n, m, dtype=torch.float64).repeat(2, 1, 1)
    s = noise(2, m, m, seed=3)
    for gradient in (x @ (s + s.mT), torch.zeros_like(x)):
        bank = torch.nn.Parameter(x.clone())
        bank.grad = gradient
        optimizer([bank], lr=0.1).step()
        assert torch.equal(bank, x)


@pytest.mark.parametrize("optimizer", [StiefelAdam, StiefelSGD])
@pytest.mark.parametrize("retraction", ["polar", "cayley", "exp"])
@pytest.mark.parametrize("n, m", [(8, 8), (9, 4)])
def test_huge_gradients_and_rates_stay_on_the_manifold(optimizer, retraction, n, m):
    bank = torch.nn.Parameter(frames(2, n, m, dtype=torch.float32))
    rule = optimizer([bank], lr=100.0, retraction=retraction)
    for seed in range(20):
        before = bank.detach().clone()
        bank.grad = 1e9 * noise(2, n, m, seed=1 + seed, dtype=torch.float32)
        rule.step()
        assert off_manifold(bank) <= 1e-6
        assert 0 < (bank - before).norm() < 2
    rule.param_groups[0]["lr"] = 1e-12  # the momentum, however large, decays
    for _ in range(400):
        bank.grad = torch.zeros_like(bank)
        rule.step()
    before = bank.detach().clone()
    rule.step()
    assert (bank - before).norm() < 1e-5


@pytest.mark.parametrize("optimizer", [StiefelAdam, StiefelSGD])
def test_a_run_goes_on_from_the_logarithms_of_its_rotations(optimizer):
    """As an adapter's file has them, with the optimizer's state: the same run within rounding."""
    whole = torch.nn.Parameter(frames(3, 6, 6))
    rule = optimizer([whole], lr=0.02)

    def steps(x, rule, seeds):
        for seed in seeds:
            x.grad = noise(3, 6, 6, seed=seed)
            rule.step()

    steps(whole, rule, range(5))
    again = torch.nn.Parameter(torch.linalg.matrix_exp(log_rotation(whole)))
    resumed = optimizer([again], lr=0.02)
    resumed.load_state_dict(copy.deepcopy(rule.state_dict()))
    steps(whole, rule, range(5, 10))
    steps(again, resumed, range(5, 10))
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-12)
