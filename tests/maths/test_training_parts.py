"""What a run is made of: averages, schedules, noise levels, objectives, settings, the guard against divergence."""

import json
import math
import random
import statistics

import pytest
import torch

from soda.errors import SodaTrainingError
from soda.training.average import Average, polar
from soda.training.guard import Guard
from soda.training.objective import dco, min_snr
from soda.training.schedule import share
from soda.training.settings import TrainingSettings
from soda.training.timesteps import Timesteps


def test_the_average_is_that_of_all_steps_seen():
    """Against the sum written out, in fp64; the average of rotations is projected."""
    g, decay = torch.Generator().manual_seed(0), 0.8
    rotations = [torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)]
    others = [torch.zeros(4, dtype=torch.float64)]
    average, seen = Average(rotations, others, decay), []
    average.write()
    assert torch.equal(others[0], torch.zeros(4, dtype=torch.float64))  # nothing seen, nothing changed
    for _ in range(7):
        a = torch.randn(2, 3, 3, generator=g, dtype=torch.float64) * 0.3
        rotations[0].copy_(torch.linalg.matrix_exp(a - a.mT))
        others[0].copy_(torch.randn(4, generator=g, dtype=torch.float64))
        seen.append((rotations[0].clone(), others[0].clone()))
        average.update()
    shares = [(1 - decay) * decay ** (len(seen) - 1 - i) for i in range(len(seen))]
    mean = [sum(s * pair[j] for s, pair in zip(shares, seen, strict=True)) / sum(shares) for j in (0, 1)]
    average.write()
    assert torch.allclose(others[0], mean[1], atol=1e-14)
    gram = mean[0].mT @ mean[0]
    values, vectors = torch.linalg.eigh(gram)
    projected = mean[0] @ (vectors * values.rsqrt()[:, None, :]) @ vectors.mT
    assert torch.allclose(rotations[0], projected, atol=1e-12) and torch.allclose(polar(projected), projected)


def test_schedules():
    cosine = [share(step, 200) for step in range(200)]
    assert cosine[0] == pytest.approx(0.1, rel=0.01) and max(cosine) > 0.98 and cosine[-1] < 1e-3
    assert share(0, 1) == 1.0
    linear = [share(step, 100, "linear", 0.1) for step in range(100)]
    assert linear[4] == pytest.approx(0.5 * 0.96) and linear[50] == pytest.approx(0.5)
    assert [share(step, 100, "constant", 0.0) for step in (0, 50, 99)] == [1.0, 1.0, 1.0]
    assert share(0, 10, "constant", 1.0) == pytest.approx(0.1) and share(9, 10, "constant", 1.0) == 1.0


def levels(count=8000, **kind):
    return Timesteps(**kind).draw(count, torch.Generator().manual_seed(0))


def test_noise_levels_follow_their_distribution():
    even, uniform = levels(kind="even"), levels(kind="uniform")
    assert even.sort().values.diff().max() < 1.01 / 8000 < uniform.sort().values.diff().max()
    for drawn in (even, uniform):
        assert drawn.mean() == pytest.approx(0.5, abs=0.02) and drawn.std() == pytest.approx(12**-0.5, abs=0.01)
    logit = torch.logit(1 - levels(kind="logit-normal", mean=0.5, std=0.7))
    assert logit.mean() == pytest.approx(0.5, abs=0.01) and logit.std() == pytest.approx(0.7, abs=0.01)
    noise = (1 - levels(kind="shifted", shift=3.0)).sort().values
    t = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    assert torch.allclose(noise, 3 * t / (1 + 2 * t), atol=1e-3)
    assert torch.allclose(levels(kind="shifted", shift=1.0), even, atol=1e-12)
    for kind in ("even", "uniform", "logit-normal", "shifted"):
        assert levels(kind=kind).min() > 0 and levels(kind=kind).max() < 1
        assert torch.equal(levels(4, kind=kind), levels(4, kind=kind))


def test_dco_is_the_formula_and_its_gradient():
    error = torch.tensor(0.31, dtype=torch.float64, requires_grad=True)
    value = dco(error, torch.tensor(0.3125, dtype=torch.float64), 1000.0)
    assert value.item() == pytest.approx(-math.log(1 / (1 + math.exp(1000 * (0.31 - 0.3125)))))
    value.backward()
    assert float(error.grad) == pytest.approx(1000 / (1 + math.exp(-1000 * (0.31 - 0.3125))))
    assert float(dco(error.detach(), error.detach(), 1000.0)) == pytest.approx(math.log(2))


def test_min_snr_weights_are_the_published_ones():
    """For a noise prediction (c = -sigma, SNR = 1 / sigma^2) and for a velocity (c^2 = sigma^2 / (sigma^2 + 1))."""
    sigma = torch.tensor([0.05, 0.3, 1.0, 4.0, 14.0], dtype=torch.float64)
    snr = 1 / sigma**2
    capped = torch.tensor([min(value, 5.0) for value in snr.tolist()], dtype=torch.float64)
    assert torch.allclose(min_snr(snr, -sigma, 5.0), capped / snr)
    assert torch.allclose(min_snr(snr, -sigma / (sigma**2 + 1).sqrt(), 5.0), capped / (snr + 1))


BAD = [
    {"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"learning_rate": math.nan}, {"warm_up": 1.5},
    {"spectrum_rate": -1.0}, {"accumulation": 0}, {"gradient_clip": -1.0}, {"ema": 1.0}, {"checkpoint_every": 0},
    {"min_snr_gamma": math.nan}, {"caption_dropout": 2.0}, {"noise_offset": -0.1}, {"prior_weight": -1.0},
    {"beta": 0.0}, {"schedule": "stairs"}, {"loss": "huber"},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_settings_out_of_range(bad):
    with pytest.raises(SodaTrainingError, match=f"{next(iter(bad))} is .*give"):
        TrainingSettings(**bad)


@pytest.mark.parametrize("bad", [{"kind": "odd"}, {"std": 0.0}, {"shift": math.inf}, {"mean": math.nan}], ids=str)
def test_timesteps_out_of_range(bad):
    with pytest.raises(SodaTrainingError, match="timesteps.*give"):
        Timesteps(**bad)


def alarm(level, seed, steps=600, spread=0.5, nothing=None):
    """The step at which the guard gives the alarm about log errors around level(step), or None."""
    noise, guard = random.Random(seed), Guard()
    return next((t for t in range(steps) if guard.sees(math.exp(level(t) + noise.gauss(0, spread)), nothing)), None)


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5, 1.5])
def test_the_guard_bears_noise_and_learning(spread):
    assert not any(alarm(lambda t: -3 - t / 200, seed, spread=spread) for seed in range(20))


@pytest.mark.parametrize(("spread", "factor"), [(0.1, 10), (0.5, 20), (1.5, 100)])
def test_the_guard_sees_a_divergence(spread, factor):
    """The error rises by the factor in steps 100 to 120."""
    found = [
        alarm(lambda t: -3 + math.log(factor) * min(1, max(0, t - 100) / 20), seed, spread=spread) for seed in range(20)
    ]
    assert all(t is not None and t >= 100 for t in found) and statistics.median(found) < 160


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.5])
def test_the_guard_sees_a_run_that_is_ruined_from_its_first_steps(spread):
    """The log error rises from -3 to 1 over steps 0 to 40, that of nothing is 0."""
    found = [alarm(lambda t: -3 + min(4, t / 10), seed, spread=spread, nothing=1.0) for seed in range(20)]
    assert all(t is not None for t in found) and statistics.median(found) < 60


def test_noise_and_a_model_that_is_worse_than_nothing_are_borne():
    assert not any(alarm(lambda t: -0.5, seed, spread=0.7, nothing=1.0) for seed in range(20))
    assert not any(alarm(lambda t: 2 - t / 200, seed, spread=0.2, nothing=1.0) for seed in range(20))


def test_nan_is_trouble_at_once_and_the_guard_can_be_put_back():
    guard = Guard()
    assert guard.sees(math.nan) and guard.sees(math.inf)
    for error in (0.5, 0.3, 0.4):
        guard.sees(error)
    again = Guard()
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert again == guard
