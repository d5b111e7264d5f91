"""StiefelAdam over long and interrupted runs, and the hold on its step."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soda.stiefel import MAX_STEP, StiefelAdam, polar


def gradients(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def identities(count, n, dtype=torch.float64):
    return torch.nn.Parameter(torch.eye(n, dtype=dtype).repeat(count, 1, 1))


def one_matrix(x, grads, lr, betas, eps):
    """The equations for one matrix, with loops over its entries and the polar factor from an SVD."""
    n, (b1, b2) = len(x), betas
    y = [[0.0] * n for _ in range(n)]
    p = [[0.0] * n for _ in range(n)]
    for t, g in enumerate(grads, 1):
        xi = torch.zeros(n, n, dtype=torch.float64)
        for i in range(n):
            for j in range(n):
                z = sum(float(x[k, i] * g[k, j] - g[k, i] * x[k, j]) for k in range(n))
                y[i][j] = b1 * y[i][j] - (1 - b1) * z
                p[i][j] = b2 * p[i][j] + (1 - b2) * z * z
                xi[i, j] = lr / (1 - b1**t) * y[i][j] / ((p[i][j] / (1 - b2**t)) ** 0.5 + eps)
        u, _, vt = torch.linalg.svd(x + x @ xi)
        x = u @ vt
    return x


@given(
    n=st.integers(1, 6), count=st.integers(1, 3), lr=st.floats(1e-4, 0.03), b1=st.floats(0, 0.95),
    b2=st.floats(0.5, 0.999), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_the_trajectory_is_that_of_each_matrix_alone(n, count, lr, b1, b2, seed):
    bank = identities(count, n)
    grads = [gradients((count, n, n), seed + t) for t in range(4)]
    optimizer = StiefelAdam([bank], lr=lr, betas=(b1, b2), eps=1e-7)
    for grad in grads:
        bank.grad = grad
        optimizer.step()
    for i in range(count):
        expected = one_matrix(torch.eye(n, dtype=torch.float64), [g[i] for g in grads], lr, (b1, b2), 1e-7)
        torch.testing.assert_close(bank[i].detach(), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("n", [3, 8, 20, 64])
def test_two_thousand_steps_stay_on_the_manifold(n):
    """fp32, noise around a pull to a target, the rate of real runs."""
    bank = identities(2, n, torch.float32)
    skew = gradients((2, n, n), 1)
    target = torch.linalg.matrix_exp(0.3 * (skew - skew.mT) / n**0.5).float()
    optimizer = StiefelAdam([bank], lr=1e-2)
    noise = torch.Generator().manual_seed(2)
    start = (bank - target).norm()
    for _ in range(2000):
        bank.grad = (bank.detach() - target) + 0.1 * torch.randn(2, n, n, generator=noise)
        optimizer.step()
    assert (bank.mT.double() @ bank.double() - torch.eye(n)).abs().max() <= 1e-6
    assert (bank - target).norm() < 0.5 * start


@given(n=st.integers(2, 12), seed=st.integers(0, 2**20))
def test_the_longest_step_still_lands_on_the_manifold(n, seed):
    """|xi|_F = 0.5 is where the projection has most to do."""
    skew = gradients((3, n, n), seed)
    skew = skew - skew.mT
    xi = MAX_STEP * skew / torch.linalg.matrix_norm(skew, keepdim=True)
    moved = torch.eye(n, dtype=torch.float64) + xi
    u, _, vt = torch.linalg.svd(moved)
    torch.testing.assert_close(polar(moved), u @ vt, rtol=0, atol=1e-7)


def test_a_saved_optimizer_goes_on_as_if_nothing_happened():
    """Through torch.save, with two groups, banks of several sizes, fp32 and fp64, and one bank that had no gradient."""

    def banks():
        return [identities(2, 4), identities(3, 7, torch.float32), identities(1, 2)]

    def build(params):
        return StiefelAdam([{"params": params[:1], "lr": 0.02}, {"params": params[1:]}], lr=0.005, betas=(0.8, 0.9))

    def steps(params, optimizer, seeds):
        for seed in seeds:
            for bank in params[:2]:
                bank.grad = gradients(bank.shape, seed, bank.dtype)
            optimizer.step()

    whole = banks()
    steps(whole, build(whole), range(9))
    first = banks()
    optimizer = build(first)
    steps(first, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"banks": [bank.detach() for bank in first], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = [torch.nn.Parameter(bank) for bank in saved["banks"]]
    resumed = build(second)
    resumed.load_state_dict(saved["optimizer"])
    steps(second, resumed, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))
    assert torch.equal(second[2], torch.eye(2, dtype=torch.float64)[None])


def test_a_gradient_along_the_matrix_itself_does_not_turn_it():
    """X S with S symmetric is normal to the manifold; 0 must not become 0/0 either."""
    bank = identities(2, 5)
    s = gradients((2, 5, 5), 3)
    for grad in (s + s.mT, torch.zeros_like(s)):
        bank.grad = grad
        StiefelAdam([bank], lr=0.1).step()
        assert torch.equal(bank, identities(2, 5))


def test_a_closure_is_called_with_gradients_on():
    bank = identities(1, 3)
    target = torch.linalg.matrix_exp(torch.tensor([[[0.0, 0.4, 0.0], [-0.4, 0.0, 0.1], [0.0, -0.1, 0.0]]]).double())
    optimizer = StiefelAdam([bank], lr=0.05)

    def closure():
        optimizer.zero_grad()
        loss = (bank - target).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(10)]
    assert losses[-1] < losses[0]
