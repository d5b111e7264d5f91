"""SODA Train on a real model: it learns, repeats, restores, and refuses what it cannot use."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from small_models import conditioning, latents, load, lora, pixel_vae, small_clip, small_model, weights
from soda_pack.soda.errors import SodaTrainingError
from soda_pack.soda.hosts.comfy import dataset
from soda_pack.soda.hosts.comfy.base import TrainableWeights
from soda_pack.soda.hosts.comfy.batches import Batches
from soda_pack.soda.hosts.comfy.diffusion import mean_error
from soda_pack.soda.hosts.comfy.patch import apply
from soda_pack.soda.hosts.comfy.preview import SamplePrompt
from soda_pack.soda.hosts.comfy.targets import attention_weights
from soda_pack.soda.training.parameters import SodaParameters
from soda_pack.soda.training.settings import TrainingSettings
from training import Watcher, loss_of, run, untouched


@pytest.mark.parametrize("decomposition", ["lq", "svd", "qr", "none"])
def test_it_learns_and_restores(decomposition):
    """What was trained lowers the loss when it is applied as an adapter, and the base is bit-equal."""
    model = small_model()
    before = weights(model)
    samples = dataset.collect([latents(3)], [conditioning()])
    one, losses = run(model, steps=25, decomposition=decomposition, samples=samples, batch=4, rate=0.03)
    assert untouched(model, before)
    assert len(losses) == 25 and set(one.layers) == set(attention_weights(model)) and one.role == "subject"
    patched, _, report = apply(model, [(one, 1.0)])
    assert report.warnings == [] and report.changed == len(one.layers)
    assert loss_of(patched, samples) < 0.998 * loss_of(model, samples)


def test_only_the_targets_are_trained():
    model = small_model()
    cross, _ = run(model, steps=2, targets="cross-attention")
    self_, _ = run(model, steps=2, targets="self-attention")
    assert all(".attn2." in name for name in cross.layers) and all(".attn1." in name for name in self_.layers)
    assert set(cross.layers) | set(self_.layers) == set(attention_weights(model))
    assert '"targets": "cross-attention"' in cross.metadata["soda.training"]


def test_same_seed_same_tensors():
    first, losses = run(small_model())
    second, again = run(small_model())
    other, _ = run(small_model(), seed=1)
    assert losses == again and first.content_hash == second.content_hash != other.content_hash


@pytest.mark.parametrize("v_prediction", [False, True])
def test_loss_is_that_of_the_models_own_prediction(v_prediction):
    """Against the formula written out: mean (output - target)^2 with target noise or velocity."""
    model = small_model(v_prediction=v_prediction)
    samples = dataset.collect([latents(1)], [conditioning()])
    seen = {}
    load(model)
    with torch.inference_mode(False), torch.no_grad():
        model.pre_run()
        (part,) = Batches(model, samples, TrainingSettings(batch_size=1, seed=5))(3).passes
        network = model.model.diffusion_model.forward

        def spy(x, t, **kwargs):
            seen["x"], seen["out"] = x, network(x, t, **kwargs)
            return seen["out"]

        model.model.diffusion_model.forward = spy
        try:
            value = float(mean_error(model, [part]))
        finally:
            del model.model.diffusion_model.forward
            model.cleanup()
    alpha, sigma, x0 = 1 / (part.sigma**2 + 1).sqrt(), part.sigma, samples[0].latent * 0.18215
    noise = (seen["x"] / alpha - x0) / sigma
    target = alpha * noise - sigma * alpha * x0 if v_prediction else noise
    assert value == pytest.approx(float((seen["out"] - target).square().mean()), rel=2e-3)


def test_sizes_and_caption_lengths_may_differ():
    model = small_model()
    lists = [latents(2, 8), latents(1, 12), latents(1, 8, seed=8)]
    captions = [conditioning(5, 7), conditioning(6, 14), conditioning(7, 7), conditioning(8, 11)]
    samples = dataset.collect(lists, captions)
    assert [tuple(s.latent.shape[2:]) for s in samples] == [(8, 8), (8, 8), (12, 12), (8, 8)]
    assert dataset.buckets(samples) == [[0, 1, 3], [2]]
    _, losses = run(model, steps=8, samples=samples, batch=4)
    assert len(losses) == 8


def test_a_lora_on_the_model_stays_active():
    model = small_model()
    before = weights(model)
    patched = model.clone()
    patched.add_patches(lora(model), 3.0)
    one, losses = run(patched, steps=2)
    _, plain = run(model, steps=2)
    assert losses[0] != plain[0]
    assert set(one.layers) == set(attention_weights(model))
    assert untouched(model, before)


def test_interrupt_and_errors_leave_the_model_as_it_was():
    model = small_model()
    before = weights(model)

    def interrupt(step):
        if step == 2:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(model, progress=Watcher(6, interrupt))
    assert untouched(model, before)

    def fail(step):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        run(model, progress=Watcher(6, fail))
    assert untouched(model, before)


def test_a_loss_that_is_not_a_number_ends_with_a_remedy():
    model = small_model()
    before = weights(model)
    broken = conditioning()
    broken[0][0] = broken[0][0].clone().fill_(float("nan"))
    with pytest.raises(SodaTrainingError, match="(?i)step 1.*learning rate"):
        run(model, samples=dataset.collect([latents(1)], [broken]))
    assert untouched(model, before)


def test_wrong_data_is_named():
    with pytest.raises(SodaTrainingError, match="no latents"):
        dataset.collect([{"samples": torch.zeros(0, 4, 8, 8)}], [conditioning()])
    with pytest.raises(SodaTrainingError, match="no caption"):
        dataset.collect([latents(2)], [[]])
    with pytest.raises(SodaTrainingError, match="5 latents but 2 captions"):
        dataset.collect([latents(5)], [conditioning(), conditioning()])
    with pytest.raises(SodaTrainingError, match="Latent 1 of 1 holds NaN"):
        dataset.collect([{"samples": torch.full((1, 4, 8, 8), float("nan"))}], [conditioning()])
    with pytest.raises(SodaTrainingError, match="Latent 2 of 2 is empty, as from Empty Latent Image"):
        dataset.collect([latents(1), {"samples": torch.zeros(1, 4, 8, 8)}], [conditioning()])
    with pytest.raises(SodaTrainingError, match="no prior latents"):
        dataset.collect([], [conditioning()], "prior latent")
    with pytest.raises(SodaTrainingError, match="wire latents, or images"):
        dataset.encode(None, None)


@pytest.mark.parametrize("shape", [(1, 16, 8, 8), (1, 4, 1, 8, 8), (1, 4, 8)])
def test_latents_of_another_model_are_named_with_the_remedy(shape):
    samples = dataset.collect([latents(1), {"samples": torch.ones(shape)}], [conditioning()])
    dataset.must_fit(samples[:1], small_model())
    with pytest.raises(SodaTrainingError, match="Prior latent 2 of 2 has .* takes 4 in 2. Encode the "):
        dataset.must_fit(samples, small_model(), "prior latent")


def test_cancelling_ends_the_decomposition_too():
    model = small_model()
    weights = TrainableWeights({model: attention_weights(model)})
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        SodaParameters(weights, "lq", 3)
    first = next(iter(weights.layers))
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        list(weights.bases([first], "lq"))


def test_batches_use_every_sample_before_any_twice():
    generator = torch.Generator().manual_seed(0)
    batch = dataset.draw([[4, 5, 6]], 7, generator)
    assert len(batch) == 7 and sorted(batch[:3]) == [4, 5, 6] and sorted(batch[3:6]) == [4, 5, 6]


def test_samples_are_shown_at_every_quarter_and_change_nothing(rough_samples):
    model, clip, vae = small_model(channels=3), small_clip(), pixel_vae()
    before = weights(model)
    with torch.inference_mode():
        captions = [clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))]
    samples = dataset.collect(dataset.encode([torch.rand(2, 16, 16, 3)], vae), captions)
    watcher = Watcher(8)
    one, losses = run(model, 8, samples=samples, progress=watcher, prompt=SamplePrompt(clip, vae, "a cat", 1), rate=0.1)
    assert [step for step, _ in watcher.previews] == [1, 3, 5, 7]
    pictures = [image.tobytes() for _, image in watcher.previews]
    assert watcher.previews[0][1].size == (16, 16) and len(set(pictures)) == 4 and not watcher.notes
    assert untouched(model, before)
    plain, without = run(model, 8, samples=samples, rate=0.1)
    assert losses == without and one.content_hash == plain.content_hash


def test_samples_show_the_average_by_any_plan(rough_samples):
    model, clip, vae = small_model(channels=3), small_clip(), pixel_vae()
    with torch.inference_mode():
        captions = [clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))]
    samples = dataset.collect(dataset.encode([torch.rand(2, 16, 16, 3)], vae), captions)
    shown = {}
    for memory, ema in (("fast", 0.9), ("frugal", 0.9), ("frugal", 0.0)):
        watcher, prompt = Watcher(8), SamplePrompt(clip, vae, "a cat", 1)
        run(model, 8, samples=samples, progress=watcher, prompt=prompt, rate=0.1, memory=memory, ema=ema)
        shown[memory, ema] = torch.stack([torch.tensor(list(image.tobytes())) for _, image in watcher.previews])
    assert (shown["fast", 0.9] - shown["frugal", 0.9]).abs().max() <= 1
    assert (shown["frugal", 0.0] - shown["frugal", 0.9]).abs().max() > 1


def test_a_failed_sample_is_told_and_not_fatal():
    model, clip = small_model(), small_clip()
    before = weights(model)
    watcher = Watcher(4)
    one, losses = run(model, 4, progress=watcher, prompt=SamplePrompt(clip, None, "a cat", 1))
    assert len(losses) == 4 and len(watcher.notes) == 4 and "The sample after step 1 failed" in watcher.notes[0]
    assert untouched(model, before)
