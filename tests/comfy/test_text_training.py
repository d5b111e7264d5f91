"""SODA Train on model and text encoder together: real CLIP and T5, their words encoded inside training."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import folder_paths
import pytest
import torch
from small_models import conditioning, latents, load, lora, pixel_vae, same, small_clip, small_model, small_t5, weights
from soda_pack.nodes.train import SodaTrain
from soda_pack.soda.errors import SodaTrainingError
from soda_pack.soda.hosts.comfy import dataset, preview, train
from soda_pack.soda.hosts.comfy.identity import run_hash
from soda_pack.soda.hosts.comfy.options import TrainingOptions
from soda_pack.soda.hosts.comfy.patch import apply
from soda_pack.soda.hosts.comfy.preview import SamplePrompt
from soda_pack.soda.hosts.comfy.targets import attention_weights, text_attention_weights
from soda_pack.soda.hosts.comfy.task import Extras
from soda_pack.soda.training.plan import PLANS
from soda_pack.soda.training.run import TrainingRun
from test_memory_plans import alike
from test_nodes import run as run_node
from training import PLAIN, Watcher, data, kept, loss_of, run, untouched

TEXTS = ["a red fox", "a photo of a (blue:1.3) cat", "a dog"]
ENCODERS = {"clip": small_clip, "t5": small_t5}


@pytest.fixture(params=ENCODERS)
def clip(request):
    return ENCODERS[request.param]()


def spoken(clip, count=3, texts=TEXTS):
    with torch.inference_mode():
        return dataset.with_texts(data(count), texts, clip)


def both(model, clip, steps=3, samples=None, extras=PLAIN, text_encoder_rate=1.0, **more):
    extras = replace(extras, clip=clip)
    return run(
        model, steps, samples=samples or spoken(clip), extras=extras, text_encoder_rate=text_encoder_rate, **more
    )


def split(adapter):
    """(layers of the model, layers of the text encoder)."""
    inside = {name for name in adapter.layers if name.startswith("diffusion_model.")}
    return inside, adapter.layers.keys() - inside


def moved(adapter, names):
    return all(any(log.any() for log in adapter.layers[name][0].logs) for name in names)


def resaid(clip, samples):
    """The samples as a clip says them now."""
    with torch.inference_mode():
        return dataset.with_texts(samples, [sample.text for sample in samples], clip)


@pytest.fixture
def runs(monkeypatch):
    """The runs that trainings make."""
    made = []

    def watched(*args):
        made.append(TrainingRun(*args))
        return made[-1]

    monkeypatch.setattr(train, "TrainingRun", watched)
    return made


def test_both_learn_and_both_are_as_they_were(clip):
    model, samples = small_model(), spoken(clip)
    before, words = weights(model), weights(clip.patcher)
    one, losses = both(model, clip, steps=25, samples=samples, rate=0.03, batch=4)
    inside, text = split(one)
    assert inside == set(attention_weights(model)) and text == set(text_attention_weights(clip.patcher))
    assert len(text) == 8 and len(losses) == 25 and moved(one, inside | text)
    assert untouched(model, before) and same(weights(clip.patcher), words) and not clip.patcher.injections
    assert not any("forward" in module.__dict__ for module in clip.cond_stage_model.modules())
    new_model, new_clip, report = apply(model, [(one, 1.0)], clip)
    assert report.changed == len(one.layers) and not report.unmatched and not report.warnings
    whole, half = loss_of(new_model, resaid(new_clip, samples)), loss_of(new_model, samples)
    assert whole < half < loss_of(model, samples)
    assert "Wire clip" in apply(model, [(one, 1.0)])[2].text()


def test_the_first_loss_is_that_of_the_frozen_encoder(clip):
    """Without an adapter the words are said as before, to the last bit."""
    model, samples = small_model(), spoken(clip)
    _, frozen = run(model, steps=1, samples=samples)
    for plan in PLANS:
        assert both(model, clip, steps=1, samples=samples, memory=plan)[1] == frozen
    _, losses = both(model, clip, steps=6, samples=samples, loss="dco", rate=0.03)
    assert losses[0] == pytest.approx(0.6931472, abs=1e-7) and losses[-1] < losses[0]


def test_the_gradient_is_that_of_the_loss(clip, runs):
    """Of the text encoder's deltas and factors, against differences of the loss of an adapter applied."""
    model, samples = small_model(), spoken(clip, 1, TEXTS[1:2])
    one, _ = both(model, clip, 1, samples=samples, batch=1, rate=1e-12, gradient_clip=0.0)
    parameters = runs[0].parameters
    group = next(group for group in parameters.groups if group.text)
    name = group.names[-1]
    (layer,) = one.layers[name]
    nothing = replace(
        layer, delta=torch.zeros_like(layer.delta), logs=tuple(map(torch.zeros_like, layer.logs)), sketch=None
    )

    def slope(change):
        """Of the loss along a changed layer, from both sides of none."""
        found = []
        for size in (0.05, -0.05):
            changed = replace(one, layers={name: (change(size),)}, name="moved")
            _, said, _ = apply(model, [(changed, 1.0)], clip)
            found.append(loss_of(model, resaid(said, samples), batch=1, seed=0, steps=1))
        return (found[0] - found[1]) / 0.1

    gradient = group.delta.grad[-1]
    along = gradient / gradient.norm() * 10
    bank, rows = group.places[0]
    n = group.sizes[0]
    full = parameters.banks[bank].grad[rows][-1]
    upper = (full - full.T)[tuple(torch.triu_indices(n, n, 1))]
    turn = upper / upper.norm() * 4
    assert slope(lambda size: replace(nothing, delta=size * along)) == pytest.approx(float(gradient @ along), rel=0.01)
    assert slope(lambda size: replace(nothing, logs=(size * turn, *nothing.logs[1:]))) == pytest.approx(
        float(upper @ turn), rel=0.01
    )


def test_every_plan_gives_the_same_adapter(clip):
    model, found = small_model(), {}
    for plan in PLANS:
        found[plan] = both(model, clip, memory=plan)
    one, losses = found["fast"]
    for plan in PLANS[1:]:
        assert found[plan][1] == pytest.approx(losses, rel=1e-5) and alike(found[plan][0], one)


def test_the_encoder_has_a_rate_of_its_own(clip, runs):
    model = small_model()
    for rate in (1.0, 1e-9):
        both(model, clip, steps=2, text_encoder_rate=rate)
    for optimizer in runs[1].optimizers.values():
        (inside, text) = optimizer.param_groups
        assert text["lr"] == pytest.approx(1e-9 * inside["lr"])
    slow = runs[1].parameters.layers()
    for name, (layer,) in runs[0].parameters.layers().items():
        for fast_log, slow_log in zip(layer.logs, slow[name][0].logs, strict=True):
            text = not name.startswith("diffusion_model.")
            assert not fast_log.numel() or (slow_log.abs().max() < 1e-8 < fast_log.abs().max()) == text


def test_patches_on_the_encoder_stay(clip):
    """A LoRA, and an adapter beside which the new one trains."""
    model, samples = small_model(), spoken(clip)
    first, _ = both(model, clip, steps=4, rate=0.05)
    patched_model, patched_clip, _ = apply(model, [(first, 0.7)], clip)
    keys = text_attention_weights(clip.patcher).values()
    patched_clip.add_patches({k: v for k, v in lora_for(patched_clip, keys).items()}, 1.0)
    expected = loss_of(patched_model, resaid(patched_clip, samples), batch=2, seed=0, steps=1)
    one, losses = both(patched_model, patched_clip, steps=2, samples=samples, rate=1e-9)
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[0] != pytest.approx(loss_of(patched_model, samples, batch=2, seed=0, steps=1), rel=2e-5)
    assert max(log.abs().max() for (layer,) in one.layers.values() for log in layer.logs if log.numel()) < 1e-5


def lora_for(clip, keys):
    """Core LoRA patches of rank 2 for these weights."""
    generator = torch.Generator().manual_seed(2)
    shapes = {key: weight.shape for key, weight in clip.patcher.model_state_dict().items()}
    patches = {}
    for key in keys:
        up, down = (torch.randn(*s, generator=generator) * 0.2 for s in ((shapes[key][0], 2), (2, shapes[key][1])))
        patches[key] = type(next(iter(lora(small_model()).values())))(set(), (up, down, 2.0, None, None, None))
    return patches


def test_going_on_from_an_adapter_of_both(clip):
    model, samples = small_model(), spoken(clip)
    first, _ = both(model, clip, steps=4, rate=0.05, samples=samples)
    new_model, new_clip, _ = apply(model, [(first, 1.0)], clip)
    _, losses = both(model, clip, 1, samples=samples, extras=Extras(start_from=first))
    assert losses[0] == pytest.approx(loss_of(new_model, resaid(new_clip, samples), batch=2, seed=0, steps=1), rel=1e-4)
    with pytest.raises(SodaTrainingError, match="not trained here.*text_encoder_rate"):
        run(model, samples=samples, extras=Extras(start_from=first))


def test_dropped_captions_and_prior_captions_are_said_by_the_encoder_too(clip):
    """Empty captions alone, and prior pictures alone, still give the text encoder a gradient."""
    model, samples = small_model(), spoken(clip)
    with torch.inference_mode():
        empty = dataset.encoded(clip, "")
    one, losses = both(model, clip, 2, samples=samples, caption_dropout=1.0, extras=Extras(empty=empty))
    same_words, again = both(model, clip, 2, samples=spoken(clip, 3, [""]))
    assert losses == again and one.content_hash == same_words.content_hash
    assert moved(one, [name for name in split(one)[1] if name.endswith(("v_proj", ".v"))])
    prior = spoken(clip, 2, ["a fox"])
    with_prior, more = both(model, clip, 2, extras=Extras(prior=prior))
    without, less = both(model, clip, 2)
    assert more[0] > 1.1 * less[0]
    assert any(not torch.equal(with_prior.layers[n][0].delta, without.layers[n][0].delta) for n in split(without)[1])


def test_samples_are_of_the_words_as_they_are_now(rough_samples):
    model, clip, vae = small_model(channels=3), small_clip(), pixel_vae()
    with torch.inference_mode():
        samples = dataset.collect(dataset.encode([torch.rand(2, 16, 16, 3)], vae), [conditioning()])
        samples = dataset.with_texts(samples, ["a cat"], clip)
    prompt, watcher = SamplePrompt(clip, vae, "a cat", 1), Watcher(4)
    one, losses = both(model, clip, 4, samples=samples, rate=0.3, progress=watcher, prompt=prompt)
    plain, without = both(model, clip, 4, samples=samples, rate=0.3)
    assert losses == without and one.content_hash == plain.content_hash and not watcher.notes
    new_model, new_clip, _ = apply(model, [(one, 1.0)], clip)

    def distance(words):
        picture = preview.sample(new_model, replace(prompt, clip=words), samples[0].shapes)
        pictures = (torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in (picture, shown))
        return torch.sub(*(pixels.int() for pixels in pictures)).abs().max()

    _, shown = watcher.previews[-1]
    assert distance(new_clip) <= 1 < distance(clip)


@pytest.fixture
def folder(tmp_path):
    before = folder_paths.get_user_directory()
    folder_paths.set_user_directory(str(tmp_path))
    yield tmp_path / "soda" / "training"
    folder_paths.set_user_directory(before)


def test_cancelled_and_queued_again_is_uncancelled_bit_for_bit(folder):
    def again(progress=None, **more):
        clip = small_clip()
        return kept(small_model(), samples=spoken(clip), extras=Extras(clip=clip), text_encoder_rate=0.5, ema=0.9,
                    progress=progress, **more)  # fmt: skip

    def cancel(step):
        if step == 4:
            comfy.model_management.interrupt_current_processing()

    whole, losses = again(reuse=False)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        again(Watcher(12, cancel))
    watcher = Watcher(12)
    one, resumed = again(watcher)
    assert "Went on from step 5" in watcher.notes[-1]
    assert resumed == losses and one.content_hash == whole.content_hash and split(one)[1]
    watcher = Watcher(12)
    assert again(watcher)[0].content_hash == whole.content_hash and "trained before" in watcher.notes[0]


def test_words_and_encoder_change_the_hash():
    def key(clip=None, texts=TEXTS, train=True):
        clip = clip or small_clip()
        model = small_model()
        with torch.inference_mode():
            return run_hash(
                model, attention_weights(model), spoken(clip, 3, texts), Extras(clip=clip if train else None)
            )

    def other(change):
        clip = small_clip()
        change(clip)
        return clip

    def weight(clip):
        with torch.inference_mode():
            clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[1].self_attn.q_proj.weight[0, 0] += 1e-3

    different = [
        key(), key(texts=["a fox"]), key(train=False), key(other(weight)), key(other(lambda clip: clip.clip_layer(-2))),
        key(other(lambda clip: clip.add_patches(lora_for(clip, text_attention_weights(clip.patcher).values())))),
    ]  # fmt: skip
    assert key() == key() and len(set(different)) == len(different)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"texts": ["a"]}, "wire clip and texts into SODA Train, or set it to 0"),
        ({"clip": True}, "wire clip and texts into SODA Train, or set it to 0"),
        ({"clip": True, "texts": ["a", "b"]}, "3 latents but 2 texts. Give one text for each image"),
        ({"clip": True, "texts": TEXTS, "prior": True}, "wire clip and prior_texts"),
    ],
)
def test_what_is_missing_is_named(more, says):
    more = {name: [value] if name != "texts" else value for name, value in more.items()}
    if "clip" in more:
        more["clip"] = [small_clip()]
    if more.pop("prior", False):
        more |= {"prior_latents": [latents(2)], "prior_positive": [conditioning()]}
    options = TrainingOptions({"text_encoder_rate": 0.5})
    settings = {"steps": 1, "learning_rate": 0.01, "batch_size": 1, "seed": 0, "decomposition": "lq", "factors": 3,
                "role": "other", "targets": "all attention", "options": options}  # fmt: skip
    listed = {name: [value] for name, value in settings.items()}
    with pytest.raises(SodaTrainingError, match=says), torch.inference_mode():
        run_node(SodaTrain, model=[small_model()], positive=[conditioning()], latents=[latents(3)], **listed, **more)


def test_the_encoder_may_be_loaded_with_other_patches_meanwhile():
    """After a training the CLIP says what it said, patched or not."""
    model, clip = small_model(), small_clip()
    one, _ = both(model, clip, rate=0.05)
    _, new_clip, _ = apply(model, [(one, 1.0)], clip)
    with torch.inference_mode():
        plain, adapted = (dataset.encoded(c, "a red fox")[0] for c in (clip, new_clip))
    both(model, new_clip, 1)
    load(clip.patcher)
    with torch.inference_mode():
        assert torch.equal(dataset.encoded(clip, "a red fox")[0], plain)
        assert torch.equal(dataset.encoded(new_clip, "a red fox")[0], adapted)
    assert not torch.allclose(plain, adapted, atol=1e-4)
