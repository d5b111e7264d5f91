"""A run as such: resuming, checkpoints, averages, schedules, noise levels, objectives, divergence."""

import json
import math
import random
import statistics

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from soda.adapt import adapt
from soda.adapter import Adapter, Layer
from soda.decomposition import decompose
from soda.errors import SodaFileError, SodaTrainingError
from soda.mixing import mix
from soda.training import checkpoint
from soda.training.average import Average, polar
from soda.training.guard import Guard
from soda.training.layers import added, difference, put
from soda.training.loop import Unwatched, train
from soda.training.objective import dco, min_snr
from soda.training.parameters import SodaParameters
from soda.training.run import Diverged, Losses, TrainingRun
from soda.training.schedule import share
from soda.training.settings import TrainingSettings
from soda.training.timesteps import Timesteps

SHAPES = {"a": (12, 12), "b": (12, 20), "c": (20, 12), "d": (12, 12)}


def weights(scale=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


TARGETS = weights(0.2, seed=1)


def noisy(adapted, batch):
    """A loss that depends on the batch's index, as diffusion losses do."""
    g = torch.Generator().manual_seed(batch)
    value = sum(((w - TARGETS[name]) * torch.rand(w.shape, generator=g)).square().mean() for name, w in adapted.items())
    return Losses(value, value)


def index(i):
    return i


def new_run(**settings):
    return TrainingRun(SodaParameters(weights()), TrainingSettings(**{"steps": 40, "learning_rate": 0.02, **settings}))


class Recorder(Unwatched):
    def __init__(self, stop_at=None):
        self.steps, self.notes, self.stop_at = [], [], stop_at

    def step(self, step, loss):
        self.steps.append(step)

    def note(self, text):
        self.notes.append(text)

    def stop_requested(self):
        return self.stop_at is not None and self.steps[-1] + 1 >= self.stop_at


def numbers(run):
    return {name: value.clone() for name, value in run.parameters.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


SETTINGS = [{}, {"ema": 0.9, "accumulation": 3}, {"schedule": "linear", "spectrum_rate": 0.5, "gradient_clip": 0.1}]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("at", [1, 17])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(tmp_path, settings, at):
    """Through a file, in a new run, as after a restart."""
    whole = new_run(**settings)
    losses = train(whole, index, noisy)
    cut, path = new_run(**settings), tmp_path / "cut.safetensors"

    class Cut(Unwatched):
        def step(self, step, loss):
            if step + 1 == at:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cut, index, noisy, Cut(), lambda state: checkpoint.write(path, state))
    again = new_run(**settings)
    again.load_state_dict(checkpoint.read(path))
    assert again.step == at
    assert train(again, index, noisy) == losses
    assert equal(numbers(again), numbers(whole))


def test_checkpoints_come_in_time_and_at_a_stop():
    kept = []
    run, watch = new_run(checkpoint_every=10), Recorder(stop_at=25)
    losses = train(run, index, noisy, watch, lambda state: kept.append(len(state["losses"])))
    assert kept == [10, 20, 25] and len(losses) == 25 and watch.steps == list(range(25))
    kept.clear()
    train(new_run(checkpoint_every=10), index, noisy, None, lambda state: kept.append(len(state["losses"])))
    assert kept == [10, 20, 30]  # at the end there is the adapter itself


def test_an_error_between_steps_keeps_the_state_first():
    run, kept = new_run(), []

    def broken(adapted, batch):
        if batch == 7:
            raise RuntimeError("no more")
        return noisy(adapted, batch)

    with pytest.raises(RuntimeError, match="no more"):
        train(run, index, broken, None, kept.append)
    assert len(kept) == 1 and len(kept[0]["losses"]) == 7


def test_a_step_that_breaks_off_in_the_middle_is_not_kept():
    """Rotations moved, spectra not: such a state is no state of the run."""
    run, kept = new_run(), []
    real = run.optimizers["spectra"].step

    def breaks():
        if run.step == 14:
            raise torch.OutOfMemoryError("in the optimizer")
        return real()

    run.optimizers["spectra"].step = breaks
    with pytest.raises(torch.OutOfMemoryError):
        train(run, index, noisy, None, kept.append)
    assert len(kept[0]["losses"]) == 10
    again = new_run()
    again.load_state_dict(kept[0])
    whole = new_run()
    assert train(again, index, noisy) == train(whole, index, noisy) and equal(numbers(again), numbers(whole))


def written(tmp_path):
    run, path = new_run(ema=0.5), tmp_path / "run.safetensors"
    train(run, index, noisy, Recorder(stop_at=12), lambda state: checkpoint.write(path, state))
    return path


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other", "tree", "pickle"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    path = written(tmp_path)
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other":
        save_file({"x": torch.zeros(2)}, path)
    elif damage == "pickle":
        torch.save({"x": 1}, path)
    else:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        metadata["state"] = json.dumps({"dict": [["now", {"tensor": "999"}]]})
        save_file(tensors, path, metadata)
    with pytest.raises(SodaFileError, match=str(path)):
        checkpoint.read(path)


def test_a_checkpoint_that_is_not_there():
    with pytest.raises(SodaFileError, match="nowhere"):
        checkpoint.read("nowhere.safetensors")


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


def test_a_run_returns_its_average():
    run, last = new_run(ema=0.9), new_run()
    train(run, index, noisy)
    train(last, index, noisy)
    assert not equal(numbers(run), numbers(last))
    for bank in run.parameters.rotations():
        assert torch.allclose(bank.mT @ bank, torch.eye(bank.shape[-1]).expand_as(bank), atol=1e-5)


def test_settled_shows_the_average_and_puts_the_run_back():
    run = new_run(ema=0.9)
    train(run, index, noisy, Recorder(stop_at=9))
    shown = numbers(run)  # the loop ended, so this is the average
    run = new_run(ema=0.9)
    for _ in range(9):
        run.advance(index, noisy)
    before = numbers(run)
    with run.settled():
        assert equal(numbers(run), shown) and not equal(shown, before)
    assert equal(numbers(run), before)


def test_accumulated_batches_are_one_large_batch():
    """Of the mean loss of three batches at once, and not of three steps."""
    parts, together = new_run(accumulation=3, steps=5), new_run(steps=5)
    train(parts, index, noisy)

    def three(adapted, batch):
        value = sum(noisy(adapted, 3 * batch + i).loss for i in range(3)) / 3
        return Losses(value, value)

    train(together, index, three)
    assert parts.losses == pytest.approx(together.losses, rel=1e-5)
    for a, b in zip(numbers(parts).values(), numbers(together).values(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_the_spectrum_has_a_rate_of_its_own():
    still = new_run(spectrum_rate=0.0, steps=5)
    train(still, index, noisy)
    assert not any(delta.any() for delta in still.parameters.spectra())
    assert any(
        not torch.equal(bank, torch.eye(bank.shape[-1]).expand_as(bank)) for bank in still.parameters.rotations()
    )


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
        assert 0 < levels(kind=kind).min() and levels(kind=kind).max() < 1
        assert torch.equal(levels(4, kind=kind), levels(4, kind=kind))


def test_dco_is_the_formula_and_its_gradient():
    error = torch.tensor(0.31, dtype=torch.float64, requires_grad=True)
    value = dco(error, torch.tensor(0.3125, dtype=torch.float64), 1000.0)
    assert float(value) == pytest.approx(-math.log(1 / (1 + math.exp(1000 * (0.31 - 0.3125)))))
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


def alarm(level, seed, steps=600, spread=0.5):
    """The step at which the guard gives the alarm about log errors around level(step), or None."""
    noise, guard = random.Random(seed), Guard()
    return next((t for t in range(steps) if guard.sees(math.exp(level(t) + noise.gauss(0, spread)))), None)


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5, 1.5])
def test_the_guard_bears_noise_and_learning(spread):
    assert not any(alarm(lambda t: -3 - t / 200, seed, spread=spread) for seed in range(40))


@pytest.mark.parametrize(("spread", "factor"), [(0.1, 10), (0.5, 20), (1.5, 100)])
def test_the_guard_sees_a_divergence(spread, factor):
    """The error rises by the factor in steps 100 to 120."""
    found = [
        alarm(lambda t: -3 + math.log(factor) * min(1, max(0, t - 100) / 20), seed, spread=spread) for seed in range(40)
    ]
    assert all(t is not None and t >= 100 for t in found) and statistics.median(found) < 160


def test_nan_is_trouble_at_once_and_the_guard_can_be_put_back():
    guard = Guard()
    assert guard.sees(math.nan) and guard.sees(math.inf)
    for error in (0.5, 0.3, 0.4):
        guard.sees(error)
    again = Guard()
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert again == guard


def test_a_diverging_run_goes_back_and_on_at_half_the_rate():
    """For some batches the loss is 1000 times as large and pulls away, the first time only."""
    run, watch, seen = new_run(steps=60), Recorder(), []

    def loss(adapted, batch):
        seen.append(batch)
        value = noisy(adapted, batch).loss
        if batch >= 30 and seen.count(30) == 1:
            value = -1000 * value + 1001 * value.detach() * 2
        return Losses(value, value)

    losses = train(run, index, loss, watch)
    assert len(losses) == 60 and len(watch.notes) == 1 and "went back to step 30 and on at 0.5" in watch.notes[0]
    assert run.rate_factor == 0.5 and watch.steps[-1] == 59 and watch.steps.count(30) == 2
    assert losses[-1] < losses[0] and max(losses) < 10


def test_three_times_back_and_then_an_error_with_the_last_good_numbers():
    run, watch, kept = new_run(steps=60), Recorder(), []
    at_ten = new_run(steps=60)
    for _ in range(10):
        at_ten.advance(index, noisy)

    def loss(adapted, batch):
        value = noisy(adapted, batch).loss * (math.nan if batch == 13 else 1.0)
        return Losses(value, value)

    with pytest.raises(Diverged, match="step 14 of 60, after 3 times.*0.0025.*lower the learning rate"):
        train(run, index, loss, watch, kept.append)
    assert len(watch.notes) == 3 and run.step == 10 and not kept
    assert equal(numbers(run), numbers(at_ten))


def test_a_resumed_run_goes_back_where_the_uninterrupted_one_would():
    def loss(adapted, batch):
        losses = noisy(adapted, batch)
        return losses if batch != 13 or run.retreats else Losses(losses.loss * math.nan, losses.error)

    run = new_run()
    whole = train(run, index, loss)
    expected, state = numbers(run), []
    run = new_run(checkpoint_every=12)
    train(run, index, loss, Recorder(stop_at=12), state.append)
    assert state[-1]["now"]["step"] == 12 and state[-1]["good"]["step"] == 10
    run = new_run()
    run.load_state_dict(state[-1])
    assert train(run, index, loss) == whole and equal(numbers(run), expected)


def layers_of(seed, kind="lq", scale=0.2):
    """A random adapter's layers for WEIGHTS, of the form that SodaParameters gives them."""
    g = torch.Generator().manual_seed(seed)
    shapes = SodaParameters(weights(), kind).layers()
    return {
        name: (
            Layer(
                kind,
                None if layer.delta is None else torch.randn(layer.delta.shape, generator=g) * scale * 0.1,
                tuple(torch.randn(log.shape, generator=g) * scale for log in layer.logs),
            ),
        )
        for name, (layer,) in shapes.items()
    }


def applied(layers, kind="lq"):
    return {name: adapt(w, layers[name], {kind: decompose(w, kind)} if kind != "none" else {})
            for name, w in weights().items()}  # fmt: skip


@pytest.mark.parametrize("kind", ["lq", "svd", "qr", "none"])
def test_layers_put_in_are_the_layers_that_come_out(kind):
    parameters, layers = SodaParameters(weights(), kind), layers_of(3, kind)
    put(parameters, layers)
    for name, w in applied(layers, kind).items():
        assert torch.allclose(parameters()[name], w, atol=1e-5)
    for name, (layer,) in parameters.layers().items():
        for a, b in zip(layer.logs, layers[name][0].logs, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kind", ["lq", "svd", "qr", "none"])
def test_trained_beside_a_frozen_mix_it_does_in_the_mix_what_it_was_trained_to_do(kind):
    """exp(A + B) is not exp(A) exp(B): the mix of the frozen adapters and the new one is the weight that was trained."""
    one, other = Adapter(layers_of(5, kind), {}, "one"), Adapter(layers_of(6, kind), {}, "other")
    frozen = mix([(one, 0.8), (other, -0.5)]).layers
    run = TrainingRun(SodaParameters(weights(), kind), TrainingSettings(steps=30, learning_rate=0.03))
    put(run.parameters, frozen)
    beside = run.parameters.layers()
    before = run.parameters()
    train(run, index, noisy)
    new = Adapter(difference(run.parameters.layers(), frozen, beside), {}, "new")
    together = mix([(one, 0.8), (new, 1.0), (other, -0.5)]).layers
    for name, w in applied(together, kind).items():
        assert torch.allclose(w, run.parameters()[name], atol=2e-5)
        assert not torch.allclose(w, before[name], atol=1e-2)


def test_untrained_beside_a_mix_it_is_nothing():
    parameters, frozen = SodaParameters(weights()), layers_of(5)
    put(parameters, frozen)
    layers = parameters.layers()
    for (layer,) in difference(layers, frozen, layers).values():
        assert all(part.abs().max() < 1e-6 for part in (layer.delta, *layer.logs, layer.sketch))


def test_unlike_forms_are_refused_with_both_named():
    parameters = SodaParameters(weights())
    with pytest.raises(SodaTrainingError, match="a by svd .*this training by lq .*set decomposition and factors"):
        put(parameters, layers_of(5, "svd"))
    with pytest.raises(SodaTrainingError, match="lq .* and svd"):
        put(parameters, added(layers_of(5), layers_of(6, "svd")))
    both = added(layers_of(5), layers_of(6))
    (a,), (b,), (c,) = both["a"], layers_of(5)["a"], layers_of(6)["a"]
    assert torch.equal(a.delta, b.delta + c.delta) and torch.equal(a.logs[1], b.logs[1] + c.logs[1])
