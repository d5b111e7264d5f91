"""A run as such: it can be resumed bit for bit, leaves checkpoints, and goes back when it diverges."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from soda.errors import SodaFileError
from soda.training import checkpoint
from soda.training.loop import Unwatched, train
from soda.training.parameters import SodaParameters
from soda.training.run import Diverged, Losses, TrainingRun
from soda.training.settings import TrainingSettings

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


def test_a_loss_scale_changes_no_bit():
    plain, scaled = new_run(steps=8), TrainingRun(SodaParameters(weights()), TrainingSettings(8, 0.02), 1024.0)
    assert train(plain, index, noisy) == train(scaled, index, noisy)
    assert equal(numbers(plain), numbers(scaled))


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


@pytest.mark.parametrize(("factor", "told"), [(1.0, 0), (1e6, 1)])
def test_a_run_that_ends_far_above_its_loss_says_so(factor, told):
    """Of the last three batches, too few for an alarm."""
    watch = Recorder()

    def loss(adapted, batch):
        value = noisy(adapted, batch).loss * (factor if batch >= 27 else 1.0)
        return Losses(value, value)

    train(new_run(steps=30), index, loss, watch)
    assert len(watch.notes) == told and all("lower the learning rate (0.02)" in note for note in watch.notes)


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
