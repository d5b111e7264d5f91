"""What a training leaves on disk: finished adapters and checkpoints, found again by all that they follow from."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import comfy.model_management
import folder_paths
import pytest
import torch
from small_models import adapter, conditioning, latents, lora, pixel_vae, small_clip, small_model, weights
from soda_pack.soda.errors import SodaFileError, SodaTrainingError
from soda_pack.soda.file import load
from soda_pack.soda.hosts.comfy import dataset
from soda_pack.soda.hosts.comfy.batches import Batches
from soda_pack.soda.hosts.comfy.identity import run_hash
from soda_pack.soda.hosts.comfy.patch import apply
from soda_pack.soda.hosts.comfy.preview import SamplePrompt
from soda_pack.soda.hosts.comfy.store import CHECKPOINT, FINISHED, KEPT, LAST_GOOD, KeptRun
from soda_pack.soda.hosts.comfy.targets import attention_weights
from soda_pack.soda.hosts.comfy.task import Extras
from soda_pack.soda.training.settings import TrainingSettings
from training import Watcher, data, kept, run, untouched


@pytest.fixture(autouse=True)
def folder(tmp_path):
    """An empty user folder; what trainings leave in it."""
    before = folder_paths.get_user_directory()
    folder_paths.set_user_directory(str(tmp_path))
    yield tmp_path / "soda" / "training"
    folder_paths.set_user_directory(before)


def endings(folder):
    return sorted(path.name[path.name.index(".") :] for path in folder.iterdir())


def stop_at(step, error=None):
    def at(seen):
        if seen == step:
            if error is not None:
                raise error
            comfy.model_management.interrupt_current_processing()

    return at


@pytest.mark.parametrize("at", [0, 7])
def test_cancelled_and_queued_again_is_uncancelled_bit_for_bit(folder, at):
    whole, losses = kept(small_model(), reuse=False)
    for path in folder.iterdir():
        path.unlink()
    model = small_model()
    before = weights(model)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        kept(model, progress=Watcher(12, stop_at(at)))
    assert endings(folder) == [CHECKPOINT] and untouched(model, before)
    watcher = Watcher(12)
    again, resumed = kept(small_model(), progress=watcher)
    assert resumed == losses and again.content_hash == whole.content_hash
    assert f"Went on from step {at + 1}" in watcher.notes[-1]
    assert watcher.restored == losses[: at + 1] and watcher.seen == list(range(at + 1, 12))
    assert endings(folder) == [".losses.json", FINISHED]


def test_the_same_inputs_are_not_trained_twice(folder):
    first, losses = kept(small_model())
    watcher = Watcher(12, lambda step: None)
    second, again = kept(small_model(), progress=watcher)
    assert again == losses and second.content_hash == first.content_hash and second.metadata["soda.role"] == "subject"
    assert "trained before" in watcher.notes[0] and not watcher.seen
    assert watcher.restored == losses  # the curve is shown
    watcher = Watcher(12)
    anew, third = kept(small_model(), progress=watcher, reuse=False)
    assert third == losses and anew.content_hash == first.content_hash and not watcher.notes


def test_a_damaged_checkpoint_is_told_and_training_starts_anew(folder):
    _, losses = kept(small_model(), reuse=False)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(RuntimeError):
        kept(small_model(), progress=Watcher(12, stop_at(5, RuntimeError("crash"))))
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    watcher = Watcher(12)
    _, again = kept(small_model(), progress=watcher)
    assert again == losses and "starts at the first step" in watcher.notes[0] and str(path) in watcher.notes[0]


def test_a_damaged_adapter_is_trained_anew(folder):
    first, _ = kept(small_model())
    (path,) = folder.glob(f"*[0-9a-f]{FINISHED}")
    path.write_bytes(path.read_bytes()[:-100])
    second, _ = kept(small_model())
    assert second.content_hash == first.content_hash and load(path).content_hash == first.content_hash


def test_a_stopped_run_is_kept_to_go_on_from(folder):
    whole, losses = kept(small_model(), reuse=False)
    for path in folder.iterdir():
        path.unlink()
    watcher = Watcher(12)
    watcher.stop_requested = lambda: len(watcher.seen) == 5
    early, some = kept(small_model(), progress=watcher)
    assert some == losses[:5] and "Stopped after step 5 of 12" in watcher.notes[-1]
    again, resumed = kept(small_model())
    assert resumed == losses and again.content_hash == whole.content_hash != early.content_hash


def test_the_strip_of_a_run_that_went_on_holds_all_its_samples(folder, rough_samples):
    """After a cancellation between two samples; the marks on the curve too."""
    prompt, strips = SamplePrompt(small_clip(), pixel_vae(), "a cat", 1, every=3), []
    with torch.inference_mode():
        samples = dataset.collect([latents(2, channels=3)], [conditioning()])

    def train(watcher):
        strips.append(watcher.strip)
        return kept(small_model(channels=3), progress=watcher, samples=samples, prompt=prompt)

    train(Watcher(12))
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(Watcher(12, stop_at(7)))
    resumed = Watcher(12)
    train(resumed)
    whole, cancelled, again = strips
    assert [step for step, _ in cancelled.samples] == [3, 6]
    assert [step for step, _ in again.samples] == [3, 6, 9, 12] and len(resumed.previews) == 2
    assert [image.tobytes() for _, image in again.samples] == [image.tobytes() for _, image in whole.samples]


def test_out_of_memory_says_what_to_lower_and_the_run_goes_on_later(folder):
    whole, losses = kept(small_model(), reuse=False)
    for path in folder.iterdir():
        path.unlink()
    model = small_model()
    before = weights(model)

    def ends(step):
        if step >= 6:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SodaTrainingError, match="batches of 2 at latent size 8x8.*Lower batch_size") as caught:
        kept(model, progress=Watcher(12, ends))
    assert caught.value.__context__ is None  # whose frames would hold the step's tensors
    assert untouched(model, before) and endings(folder) == [CHECKPOINT]
    assert kept(model)[1] == pytest.approx(losses, rel=1e-5)  # some steps were taken by other plans


def test_a_run_that_diverges_ends_with_a_file_of_its_last_good_step(folder, monkeypatch):
    """Latents that turn infinite after 13 steps."""
    model, watcher, draw = small_model(), Watcher(40), Batches.__call__
    before = weights(model)

    def poisoned(self, index):
        batch = draw(self, index)
        return batch if index < 13 else replace(batch, passes=[replace(p, x=p.x * math.inf) for p in batch.passes])

    monkeypatch.setattr(Batches, "__call__", poisoned)
    with pytest.raises(SodaTrainingError, match="after 3 times.*lower the learning rate.*after step 10 is kept in"):
        kept(model, 40, progress=watcher)
    (path,) = folder.iterdir()
    assert path.name.endswith(LAST_GOOD) and load(path).layers
    assert len([note for note in watcher.notes if "went back to step 10" in note]) == 3
    assert untouched(model, before)


def test_a_folder_that_cannot_be_written_to_does_not_cost_the_training(folder):
    folder.parent.mkdir(parents=True)
    folder.write_text("a file in its place")
    watcher = Watcher(12)
    one, losses = kept(small_model(), progress=watcher, checkpoint_every=3)
    assert len(losses) == 12 and one.layers
    assert len(watcher.notes) == 1 and "not kept on disk" in watcher.notes[0]


def test_the_newest_of_each_kind_are_kept(folder):
    one = adapter(small_model())
    for number in range(KEPT + 3):
        run_ = KeptRun(f"{number:064x}")
        run_.keep({"losses": torch.zeros(1)})
        os.utime(run_.path(CHECKPOINT), (number, number))
    for number in range(KEPT + 3):
        KeptRun(f"{100 + number:064x}").finish(one, [0.5])
    assert len(list(folder.iterdir())) == 3 * KEPT
    assert not KeptRun(f"{0:064x}").path(CHECKPOINT).exists() and KeptRun(f"{KEPT + 2:064x}").path(CHECKPOINT).exists()
    assert KeptRun(f"{KEPT + 102:064x}").finished() is not None


def key(model=None, samples=None, inputs=("lq", 3), **settings):
    model = model or small_model()
    with torch.inference_mode():
        return run_hash(model, attention_weights(model), samples or data(), TrainingSettings(**settings), *inputs)


def changed_elsewhere():
    """Another base of which no adapted weight differs."""
    model = small_model()
    with torch.inference_mode():
        model.model.diffusion_model.input_blocks[0][0].weight.data[0, 0, 0, 0] += 1e-3
    return model


def with_lora(seed):
    patched = small_model().clone()
    patched.add_patches(lora(patched, seed), 0.5)
    return patched


def test_the_hash_is_that_of_the_contents():
    assert key() == key()
    assert key(model=with_lora(1)) == key(model=with_lora(1))


def test_everything_that_changes_the_result_changes_the_hash():
    base = small_model()
    different = {
        "as it is": key(), "seed": key(seed=1), "steps": key(steps=201), "ema": key(ema=0.5), "factors":
        key(inputs=("lq", 2)), "other weights": key(model=small_model(seed=1)), "elsewhere": key(changed_elsewhere()),
        "lora": key(model=with_lora(1)), "other lora": key(model=with_lora(2)),
        "adapter": key(model=apply(base, [(adapter(base), 1.0)])[0]),
        "weight": key(model=apply(base, [(adapter(base), 0.5)])[0]),
        "latents": key(samples=dataset.collect([latents(3, seed=9)], [conditioning()])),
        "captions": key(samples=dataset.collect([latents(3)], [conditioning(seed=9)])),
        "order": key(samples=data()[::-1]),
        "start": key(inputs=("lq", 3, Extras(start_from=adapter(base)))),
        "other start": key(inputs=("lq", 3, Extras(start_from=adapter(base, seed=2)))),
        "prior": key(inputs=("lq", 3, Extras(prior=data(1)))),
        "layers": key(inputs=("lq", 3, Extras(layers="*attn1*"))),
    }  # fmt: skip
    assert len(set(different.values())) == len(different)


def test_model_options_and_object_patches_count():
    def with_option(value):
        patched = small_model().clone()
        patched.set_model_sampler_cfg_function(lambda args, scale=value: args["cond"] * scale)
        return patched

    def with_object():
        patched = small_model().clone()
        patched.add_object_patch("model_sampling", small_model(v_prediction=True).model.model_sampling)
        return patched

    assert key(model=with_option(1)) == key(model=with_option(1))
    assert len({key(), key(model=with_option(1)), key(model=with_option(2)), key(model=with_object())}) == 4


def test_nothing_is_kept_that_was_not_asked_for(folder):
    run(small_model(), steps=2)
    assert not folder.exists()


def test_a_missing_checkpoint_is_none(folder):
    assert KeptRun("0" * 64).checkpoint() is None and KeptRun("0" * 64).finished() is None
    folder.mkdir(parents=True)
    KeptRun("0" * 64).path(CHECKPOINT).write_text("no checkpoint")
    with pytest.raises(SodaFileError, match="cannot be read"):
        KeptRun("0" * 64).checkpoint()
