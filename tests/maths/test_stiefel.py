"""StiefelAdam against the equations one matrix at a time, with an exact polar factor."""

import pytest
import torch

from soda.stiefel import MAX_STEP, StiefelAdam


def rotations(count, n, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    a = 0.5 * torch.randn(count, n, n, generator=g, dtype=torch.float64)
    return torch.linalg.matrix_exp(a - a.mT).to(dtype)


def naive_steps(x, gradients, lr, b1, b2, eps):
    y, p = torch.zeros_like(x), torch.zeros_like(x)
    for t, g in enumerate(gradients, 1):
        z = x.T @ g - g.T @ x
        y = b1 * y - (1 - b1) * z
        p = b2 * p + (1 - b2) * z * z
        xi = lr / (1 - b1**t) * y / ((p / (1 - b2**t)).sqrt() + eps)
        if xi.norm() > 0.5:
            xi = xi * 0.5 / xi.norm()
        u, _, vt = torch.linalg.svd(x + x @ xi)
        x = u @ vt
    return x


@pytest.mark.parametrize("n", [1, 2, 5, 16])
@pytest.mark.parametrize("lr", [1e-3, 1e-2, 0.2])
def test_steps_are_the_equations(n, lr):
    """The largest rate reaches the limit on the step."""
    g = torch.Generator().manual_seed(1)
    bank = torch.nn.Parameter(rotations(3, n))
    start = bank.detach().clone()
    gradients = [torch.randn(3, n, n, generator=g, dtype=torch.float64) for _ in range(5)]
    optimizer = StiefelAdam([bank], lr=lr, betas=(0.8, 0.95), eps=1e-6)
    for gradient in gradients:
        bank.grad = gradient
        optimizer.step()
    for i in range(3):
        expected = naive_steps(start[i], [gradient[i] for gradient in gradients], lr, 0.8, 0.95, 1e-6)
        assert torch.allclose(bank[i], expected, atol=1e-5)


@pytest.mark.parametrize("n", [2, 7, 16, 64])
def test_a_thousand_noisy_steps_stay_orthogonal(n):
    bank = torch.nn.Parameter(rotations(2, n, dtype=torch.float32))
    optimizer = StiefelAdam([bank], lr=1e-2)
    g = torch.Generator().manual_seed(2)
    for _ in range(1000 if n < 64 else 300):
        bank.grad = torch.randn(2, n, n, generator=g)
        optimizer.step()
    assert (bank.mT @ bank - torch.eye(n)).abs().max() < 3e-6
    assert torch.allclose(torch.linalg.det(bank.double()), torch.ones(2, dtype=torch.float64), atol=1e-4)


def test_it_finds_the_nearest_rotation():
    target, bank = rotations(4, 6, 1), torch.nn.Parameter(rotations(4, 6, 0))
    optimizer = StiefelAdam([bank], lr=0.02)
    for step in range(600):
        optimizer.zero_grad()
        (bank - target).square().sum().backward()
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 600)
        optimizer.step()
    assert (bank - target).norm() < 1e-3


def test_one_step_is_bounded():
    bank = torch.nn.Parameter(rotations(1, 8))
    before = bank.detach().clone()
    bank.grad = 1e6 * torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    StiefelAdam([bank], lr=100.0).step()
    angles = torch.linalg.eigvals(before.mT @ bank.detach()).angle().abs()
    assert 0 < angles.square().sum().sqrt() <= MAX_STEP + 1e-6


def test_a_resumed_run_is_the_same_run():
    def steps(bank, optimizer, seeds):
        for seed in seeds:
            bank.grad = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            optimizer.step()

    whole, half = (torch.nn.Parameter(rotations(2, 5)) for _ in range(2))
    steps(whole, StiefelAdam([whole]), range(6))
    first = StiefelAdam([half])
    steps(half, first, range(3))
    second = StiefelAdam([half])
    second.load_state_dict(first.state_dict())
    steps(half, second, range(3, 6))
    assert torch.equal(whole, half)


def test_a_bank_without_gradient_stays():
    bank = torch.nn.Parameter(rotations(2, 5))
    before = bank.detach().clone()
    StiefelAdam([bank]).step()
    assert torch.equal(bank, before)


@pytest.mark.parametrize("bad", [torch.zeros(3, 3), torch.zeros(2, 3, 4), torch.zeros(2, 3, 3, dtype=torch.bfloat16)])
def test_what_is_no_bank_is_refused(bad):
    with pytest.raises(ValueError, match="bank"):
        StiefelAdam([torch.nn.Parameter(bad)])
