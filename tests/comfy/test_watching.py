"""The parts behind the live curve: thinning and smoothing, samples that do not fit, the strip."""

import math
import random

import pytest
import torch
from PIL import Image
from small_models import conditioning, latents, pixel_vae, small_clip, small_model
from soda_pack.soda.errors import SodaFileError
from soda_pack.soda.hosts.comfy import dataset, live
from soda_pack.soda.hosts.comfy.curve import LONGEST, LossCurve
from soda_pack.soda.hosts.comfy.preview import SamplePrompt
from soda_pack.soda.hosts.comfy.progress import TrainingProgress
from soda_pack.soda.hosts.comfy.strip import COLUMNS, MOST, Strip
from soda_pack.soda.hosts.comfy.task import Task
from soda_pack.soda.hosts.comfy.train import train_adapter
from soda_pack.soda.training.settings import TrainingSettings


def curve(losses) -> LossCurve:
    made = LossCurve()
    for step, loss in enumerate(losses, start=1):
        made.add(step, loss)
    return made


def test_smoothing_is_the_weighted_mean_of_all_losses_so_far():
    losses = [random.Random(1).random() + 1 for _ in range(50)]
    for step, loss, smoothed in curve(losses).points:
        weights = [0.9 ** (step - 1 - index) for index in range(step)]
        expected = sum(w * value for w, value in zip(weights, losses, strict=False)) / sum(weights)
        assert loss == losses[step - 1] and smoothed == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 999, 1000, 1001, 12_345])
def test_a_long_run_is_thinned_evenly(steps):
    made = curve(range(steps))
    assert len(made.points) <= LONGEST and len(made.points) >= min(steps, LONGEST // 2)
    assert [step for step, *_ in made.points] == list(range(made.stride, steps + 1, made.stride))
    assert all(loss == step - 1 for step, loss, _ in made.points)


def test_going_back_forgets_what_came_after():
    made = curve([1.0, 2.0, 3.0])
    for step, loss in ((4, 1e9), (5, 1e9), (4, 2.5)):
        made.add(step, loss)
    assert [point[:2] for point in made.points] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 2.5)]
    assert 1 < made.points[-1][2] < 3
    made.add(1, 7.0)
    assert made.points == [(1, 7.0, pytest.approx(7.0))]


def test_a_loss_that_is_not_finite_is_left_out():
    made = curve([1.0, math.nan, math.inf, 1.0])
    assert [step for step, *_ in made.points] == [1, 4] and made.smoothed == pytest.approx(1.0)


def test_without_a_node_nothing_is_listed():
    before = live.summaries()
    with TrainingProgress(3, None) as progress:
        progress.step(0, 1.0)
        assert not progress.stop_requested()
    assert live.summaries() == before


def test_a_failed_training_says_so():
    with pytest.raises(ValueError, match="broken"), TrainingProgress(3, "failing") as progress:
        progress.step(0, 1.0)
        raise ValueError("broken")
    (training,) = [t for t in live.summaries() if t["node"] == "failing"]
    assert training["state"] == "failed" and not live.stop("failing", training["prompt"])


def test_restored_losses_are_on_the_curve_and_not_in_the_time_left():
    with TrainingProgress(10, "restored") as progress:
        progress.restore([3.0, 2.0], [[2, torch.zeros(64, 64, 3, dtype=torch.uint8)]])
        progress.step(2, 1.0)
        (training,) = [t for t in live.summaries() if t["node"] == "restored"]
        assert [point[:2] for point in training["points"]] == [(1, 3.0), (2, 2.0), (3, 1.0)]
        assert training["done"] == 3 and training["left"] < 1 and training["samples"] == [2]


@pytest.mark.parametrize(("every", "steps", "expected"), [
    (0, 8, [1, 3, 5, 7]), (0, 2, [0, 1]), (3, 8, [2, 5, 7]), (1, 3, [0, 1, 2]), (100, 3, [2]),
])  # fmt: skip
def test_when_a_sample_is_due(every, steps, expected):
    prompt = SamplePrompt(None, None, "", 0, every)
    assert [step for step in range(steps) if prompt.due(step, steps)] == expected


def train(vae, steps: int = 2) -> TrainingProgress:
    samples = dataset.collect([latents(1, channels=3)], [conditioning()])
    progress = TrainingProgress(steps, None)
    task = Task(small_model(channels=3), samples, TrainingSettings(steps, batch_size=1))
    with torch.inference_mode():
        _, losses = train_adapter(task, progress, SamplePrompt(small_clip(), vae, "a cat", 1, every=1))
    assert len(losses) == steps
    return progress


def test_a_sample_that_does_not_fit_is_left_out_with_a_note():
    vae = pixel_vae()
    vae.memory_used_decode = lambda shape, dtype: 2**60
    progress = train(vae)
    assert [note for note in progress.notes if "needs" in note and "GiB more memory" in note] == progress.notes
    assert len(progress.notes) == 2 and not progress.strip.samples


def test_running_out_of_memory_in_a_sample_is_not_fatal(rough_samples):
    vae = pixel_vae()
    decode, calls = vae.decode, []

    def fails_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return decode(*args, **kwargs)

    vae.decode = fails_once
    progress = train(vae)
    assert progress.notes == ["The sample after step 1 failed: out of memory"]
    assert [step for step, _ in progress.strip.samples] == [2]


def test_the_strip_is_bounded_labelled_and_an_image():
    strip = Strip()
    for step in range(1, 3 * MOST):
        strip.add(step, Image.new("RGB", (64, 32), (step % 256, 0, 0)))
    steps = [step for step, _ in strip.samples]
    assert len(steps) <= MOST and steps[-1] == 3 * MOST - 1 and steps == sorted(steps)
    sheet = strip.draw()
    assert sheet.width < (COLUMNS + 1) * 200 and sheet.getpixel((10, 40)) == (steps[0] % 256, 0, 0)

    strip.add(strip.samples[-2][0], Image.new("RGB", (64, 32)))
    assert [step for step, _ in strip.samples] == steps[:-1]  # training went back

    large = Strip()
    large.add(7, Image.new("RGB", (2048, 1024)))
    assert large.samples[0][1].size == (512, 256)


def test_a_strip_is_saved_whole_or_not_at_all(output):
    resource, strip = pytest.importorskip("resource"), Strip()
    strip.add(1, Image.effect_noise((256, 256), 60))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(SodaFileError, match="training_00001_.png.*check the free space"):
            strip.save({})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((output / "soda").iterdir())
    assert [strip.save({"prompt": "a cat"}) for _ in range(2)] == [("soda", f"training_0000{i}_.png") for i in (1, 2)]
    assert Image.open(output / "soda" / "training_00002_.png").text == {"prompt": "a cat"}
