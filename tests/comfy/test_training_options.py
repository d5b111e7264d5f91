"""Each option of SODA Train on a real model: it does what it says, and what cannot be is refused."""

from __future__ import annotations

import math

import model_zoo
import pytest
import torch
from small_models import (
    CONTEXT,
    adapter,
    conditioning,
    latents,
    load,
    pixel_vae,
    same,
    small_clip,
    small_model,
    weights,
)
from soda_pack.soda.adapter import Adapter
from soda_pack.soda.errors import SodaTrainingError
from soda_pack.soda.hosts.comfy import augment, dataset
from soda_pack.soda.hosts.comfy.batches import Batches
from soda_pack.soda.hosts.comfy.patch import apply, attached
from soda_pack.soda.hosts.comfy.targets import attention_weights
from soda_pack.soda.hosts.comfy.task import Extras
from soda_pack.soda.training.settings import TrainingSettings
from soda_pack.soda.training.timesteps import Timesteps
from training import Watcher, data, loss_of, run, untouched


def passes(model, samples=None, index=0, empty=None, **settings):
    """The passes of one batch."""
    load(model)
    with torch.inference_mode(False), torch.no_grad():
        batches = Batches(model, samples or data(), TrainingSettings(**{"batch_size": 4, **settings}), empty)
        return batches(index).passes


def test_dco_starts_at_log_2_and_learns():
    """Without an adapter the two models are one: the difference is 0 to the last bit."""
    model, samples = small_model(), data()
    before = weights(model)
    one, losses = run(model, steps=25, rate=0.03, samples=samples, batch=4, loss="dco")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-7) and losses[-1] < 0.9 * losses[0]
    assert loss_of(apply(model, [(one, 1.0)])[0], samples) < loss_of(model, samples)
    assert untouched(model, before)


def test_dco_beside_an_adapter_compares_with_that_adapter_on():
    model = small_model()
    patched, _, _ = apply(model, [(adapter(model, 5), 0.7)])
    _, losses = run(patched, steps=2, loss="dco")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("v_prediction", [False, True])
def test_min_snr_weights_are_those_of_the_prediction(v_prediction):
    model = small_model(v_prediction=v_prediction)
    (part,) = passes(model, min_snr_gamma=5.0, batch_size=8)
    snr = 1 / part.sigma.double() ** 2
    expected = snr.clamp(max=5.0) / (snr + 1 if v_prediction else snr)
    assert torch.allclose(part.weight.flatten().double(), expected, rtol=1e-4)
    assert part.weight.min() < 0.5 < part.weight.max()
    (plain,) = passes(model, batch_size=8)
    assert torch.equal(plain.weight, torch.ones_like(plain.weight)) and torch.equal(plain.x, part.x)
    _, weighted = run(model, steps=1, batch=8, min_snr_gamma=1.0)
    _, unweighted = run(model, steps=1, batch=8)
    assert weighted[0] < unweighted[0]


def test_noise_levels_are_those_chosen():
    model = small_model()
    (even,) = passes(model, batch_size=64)
    (high,) = passes(model, batch_size=64, timesteps=Timesteps("shifted", shift=8.0))
    (middle,) = passes(model, batch_size=64, timesteps=Timesteps("logit-normal", std=0.2))
    assert high.sigma.median() > 2 * even.sigma.median()
    assert middle.sigma.log().std() < 0.5 * even.sigma.log().std()


def test_caption_dropout_puts_the_empty_caption_in():
    model = small_model()
    empty = conditioning(seed=9)[0]
    parts = passes(model, batch_size=4, caption_dropout=1.0, empty=empty)
    contexts = torch.cat([part.condition["c_crossattn"] for part in parts])
    assert torch.equal(contexts, empty[0].expand(4, -1, -1))
    half = passes(model, batch_size=200, caption_dropout=0.5, empty=empty)
    dropped = sum(int((row == empty[0][0]).all()) for part in half for row in part.condition["c_crossattn"])
    assert 70 < dropped < 130
    (plain,) = passes(model, batch_size=4)
    (part,) = parts
    assert torch.equal(part.x, plain.x)  # nothing else is drawn anew
    with pytest.raises(SodaTrainingError, match="caption_dropout.*wire a clip"):
        run(model, caption_dropout=0.5)
    run(model, caption_dropout=0.5, extras=Extras(empty=empty), steps=2)


def test_the_empty_caption_comes_from_the_clip():
    clip = small_clip()
    with torch.inference_mode():
        caption = dataset.encoded(clip, "")
    assert caption[0].shape[-1] == CONTEXT and isinstance(caption[1], dict)


def test_noise_offset_shifts_whole_channels():
    model = small_model()
    (plain,), (shifted,) = passes(model), passes(model, noise_offset=0.5)
    shift = (shifted.x - plain.x) / shifted.sigma.view(-1, 1, 1, 1)
    assert torch.equal(plain.sigma, shifted.sigma)
    assert shift.flatten(2).std(-1).max() < 1e-3 < 0.1 < shift.flatten(2).mean(-1).std()


def test_sdxl_is_told_the_size_of_each_picture():
    """Height, width, no crop, and the same once more, each as core embeds a number; behind the pooled text."""
    model = model_zoo.build("SDXL")
    model.patch_model(device_to=None)
    caption = model_zoo.conditioning("SDXL")
    pooled = caption[0][1]["pooled_output"]
    for height, width in ((8, 16), (16, 8)):
        samples = dataset.collect([{"samples": torch.randn(1, 4, height, width)}], [caption])
        (one,) = Batches(model, samples, TrainingSettings(batch_size=1))(0).passes
        told = torch.tensor([8 * height, 8 * width, 0, 0, 8 * height, 8 * width])
        embedded = model.model.embedder(told).flatten()
        assert torch.allclose(one.condition["y"][0], torch.cat([pooled[0], embedded]).to(one.condition["y"]))


def test_prior_pictures_count_by_their_weight():
    model = small_model()
    prior = dataset.collect([latents(2, 12, seed=20)], [conditioning(21)])
    before = weights(model)
    first = [run(model, steps=1, extras=Extras(prior=prior), prior_weight=w)[1][0] for w in (0.0, 1.0, 3.0)]
    (plain,) = run(model, steps=1)[1]
    assert first[0] == plain and first[2] - first[0] == pytest.approx(3 * (first[1] - first[0]), rel=1e-5)
    assert first[1] > 1.1 * first[0]
    kept, _ = run(model, steps=10, rate=0.03, batch=4, extras=Extras(prior=prior), prior_weight=3.0)
    free, _ = run(model, steps=10, rate=0.03, batch=4)
    assert loss_of(apply(model, [(kept, 1.0)])[0], prior) < loss_of(apply(model, [(free, 1.0)])[0], prior)
    assert untouched(model, before)


def test_a_pattern_chooses_layers_out_of_the_targets():
    model = small_model()
    some, _ = run(model, steps=1, targets="self-attention", extras=Extras(layers="*output_blocks*to_[qk]"))
    assert some.layers
    for name in attention_weights(model, "self-attention"):
        assert (name in some.layers) == ("output_blocks" in name and name.endswith(("to_q", "to_k")))
    with pytest.raises(
        SodaTrainingError, match="'\\*attn2\\*', which matches none of .* self-attention.*diffusion_model"
    ):
        run(model, targets="self-attention", extras=Extras(layers="*attn2*"))


def test_ema_returns_another_adapter_of_the_same_run():
    model = small_model()
    (last, losses), (average, same_losses) = run(model), run(model, ema=0.9)
    assert losses == same_losses and last.content_hash != average.content_hash


def test_accumulation_draws_a_batch_of_its_own_for_each_part():
    model = small_model()
    _, (two,) = run(model, steps=1, accumulation=2)
    singles = [run(model, steps=n + 1, rate=1e-12)[1][n] for n in (0, 1)]
    assert two == pytest.approx(sum(singles) / 2, rel=1e-5)


@pytest.mark.parametrize("factors", [1, 3])
@pytest.mark.parametrize("decomposition", ["lq", "svd", "qr", "none"])
def test_going_on_from_an_adapter_starts_where_that_ended(decomposition, factors):
    model, samples = small_model(), data()
    first = adapter(model, 5, 0.1, decomposition, factors)
    patched, _, _ = apply(model, [(first, 1.0)])
    settings = {"decomposition": decomposition, "factors": factors, "samples": samples, "batch": 2}
    more, losses = run(model, steps=2, extras=Extras(start_from=first), **settings)
    assert losses[0] == pytest.approx(loss_of(patched, samples, batch=2, seed=0, steps=1), rel=1e-4)
    still, _ = run(model, steps=1, rate=1e-12, extras=Extras(start_from=first), **settings)
    for name, (layer,) in still.layers.items():
        for a, b in zip(layer.logs, first.layers[name][0].logs, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    assert more.content_hash != still.content_hash


def test_an_adapter_to_go_on_from_must_fit():
    model = small_model()
    with pytest.raises(SodaTrainingError, match="set decomposition and factors"):
        run(model, extras=Extras(start_from=adapter(model, decomposition="svd")))
    with pytest.raises(SodaTrainingError, match="set decomposition and factors"):
        run(model, extras=Extras(start_from=adapter(model, factors=2)))
    with pytest.raises(SodaTrainingError, match="not trained here.*Choose targets"):
        run(model, targets="cross-attention", extras=Extras(start_from=adapter(model)))
    part = Adapter({k: v for k, v in adapter(model).layers.items() if ".attn2." in k})
    whole, _ = run(model, steps=1, extras=Extras(start_from=part))
    assert len(whole.layers) > len(part.layers)


def test_beside_an_adapter_the_new_one_is_one_more_part_of_the_mix():
    """The run starts at the patched model, and what it ends with is the patched model with the new adapter added."""
    model, samples = small_model(), data()
    before = weights(model)
    first = adapter(model, 5, 0.6)
    patched, _, _ = apply(model, [(first, 0.7)])
    patched_before, parts = {key: list(value) for key, value in patched.patches.items()}, attached(patched)
    new, losses = run(patched, steps=25, rate=0.03, batch=4, samples=samples)
    assert losses[0] == pytest.approx(loss_of(patched, samples, batch=4, seed=0, steps=1), rel=1e-4)
    assert losses[0] != pytest.approx(loss_of(model, samples, batch=4, seed=0, steps=1), rel=1e-3)
    both, _, report = apply(patched, [(new, 1.0)])
    assert not report.warnings and loss_of(both, samples) < 0.998 * loss_of(patched, samples)
    assert patched.patches == patched_before and attached(patched) == parts
    again, _, _ = apply(apply(model, [(new, 1.0)])[0], [(first, 0.7)])
    assert loss_of(again, samples) == pytest.approx(loss_of(both, samples), rel=1e-6)
    load(model)
    assert same(before, weights(model))


def test_beside_an_adapter_layers_that_are_not_trained_keep_it():
    model, samples = small_model(), data()
    patched, _, _ = apply(model, [(adapter(model, 5, 0.2), 1.0)])
    new, losses = run(patched, steps=1, samples=samples, targets="cross-attention")
    assert losses[0] == pytest.approx(loss_of(patched, samples, batch=2, seed=0, steps=1), rel=1e-4)
    assert all(".attn2." in name for name in new.layers)


def test_beside_an_adapter_of_another_form_is_refused():
    model = small_model()
    patched, _, _ = apply(model, [(adapter(model, decomposition="svd"), 1.0)])
    with pytest.raises(SodaTrainingError, match="svd with factors .*this training by lq"):
        run(patched)


def test_views_are_varied_and_repeatable():
    g = torch.Generator().manual_seed(0)
    picture = torch.rand(3, 16, 24, 3, generator=g) * 0.8 + 0.1

    def seen(**settings):
        off = {"flip": False, "crop": 0.0, "colour": 0.0}
        return augment.view(picture, augment.Augment(**off | settings), torch.Generator().manual_seed(1))

    assert torch.equal(seen(), picture)
    flipped = seen(flip=True)
    kinds = [torch.equal(a, b) or 2 * torch.equal(a, b.flip(1)) for a, b in zip(flipped, picture, strict=True)]
    assert all(kinds) and any(kind == 2 for kind in kinds)
    cropped, coloured = seen(crop=0.4), seen(colour=0.5)
    for varied in (cropped, coloured):
        assert varied.shape == picture.shape and not torch.allclose(varied, picture, atol=0.02)
        assert varied.min() >= 0 and varied.max() <= 1
    assert torch.equal(seen(crop=0.4, colour=0.5, flip=True), seen(crop=0.4, colour=0.5, flip=True))
    ramp = torch.linspace(0, 1, 24).expand(1, 16, 24)[..., None].repeat(1, 1, 1, 3)
    cut = augment.view(ramp, augment.Augment(flip=False, crop=0.5), torch.Generator().manual_seed(3))
    assert cut[0, 0, :, 0].diff().min() > 0 and cut.max() - cut.min() < 0.99  # a part of it, in its order


def test_views_are_samples_with_the_caption_of_their_image():
    vae = pixel_vae()
    images = [torch.rand(1, 16, 16, 3), torch.rand(1, 16, 24, 3)]
    captions = [conditioning(1), conditioning(2)]
    with torch.inference_mode():
        samples = dataset.collect(dataset.encode(images, vae), captions)
        varied = augment.views(samples, images, vae, augment.Augment(views=3), 7)
    assert varied[:2] == samples and len(varied) == 6
    for i, sample in enumerate(varied):
        assert sample.caption is samples[i % 2].caption and sample.latent.shape == samples[i % 2].latent.shape
    assert not torch.equal(varied[2].latent, varied[4].latent)
    _, losses = run(small_model(channels=3), steps=2, samples=varied)
    assert len(losses) == 2
    with pytest.raises(SodaTrainingError, match="crop is 0.9"):
        augment.Augment(crop=0.9)


def test_a_stop_keeps_the_adapter_as_it_is():
    model = small_model()
    before, watcher = weights(model), Watcher(9)
    watcher.stop_requested = lambda: len(watcher.seen) == 4
    one, losses = run(model, steps=9, progress=watcher)
    assert len(losses) == 4 and watcher.seen == [0, 1, 2, 3]
    assert any(layer.logs[-1].any() for (layer,) in one.layers.values()) and untouched(model, before)
