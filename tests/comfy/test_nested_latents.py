"""Training on latents of several parts, as ComfyUI's nodes for video with sound give them."""

from __future__ import annotations

import comfy.nested_tensor
import comfy.utils
import model_zoo
import pytest
import torch
from comfy.ldm.minimax import model as minimax
from small_models import load, small_model
from soda_pack.soda.errors import SodaTrainingError
from soda_pack.soda.hosts.comfy import dataset, preview
from soda_pack.soda.hosts.comfy.batches import Batches
from soda_pack.soda.hosts.comfy.progress import TrainingProgress
from soda_pack.soda.hosts.comfy.task import Task
from soda_pack.soda.hosts.comfy.train import train_adapter
from soda_pack.soda.training.settings import TrainingSettings


def av_latents(*shapes):
    """One nested latent of a video and its sound for each pair of shapes."""
    generator = torch.Generator().manual_seed(4)
    return [
        {"samples": comfy.nested_tensor.NestedTensor([torch.randn(1, *part, generator=generator) for part in pair])}
        for pair in shapes
    ]


def passes(model, samples, index=0, **settings):
    load(model)
    with torch.inference_mode(False), torch.no_grad():
        batches = Batches(model, samples, TrainingSettings(**{"batch_size": 2, **settings}), None)
        return batches(index).passes


LTXAV = [((128, 1, 8, 8), (8, 4, 16)), ((128, 1, 8, 8), (8, 4, 16))]


def test_all_parts_are_noised_alike_and_keep_their_places():
    model = model_zoo.build("LTXAV")
    given = av_latents(*LTXAV)
    samples = dataset.collect(given, [model_zoo.conditioning("LTXAV")])
    (part,) = passes(model, samples)
    video, sound = comfy.utils.unpack_latents(part.x0, part.shapes)
    assert video.shape == (2, 128, 1, 8, 8) and sound.shape == (2, 8, 4, 16)
    packed = [comfy.utils.pack_latents(latent["samples"].unbind())[0] for latent in given]
    wanted = {model.model.process_latent_in(one).flatten().numpy().tobytes() for one in packed}
    assert {row.flatten().numpy().tobytes() for row in part.x0} == wanted
    sigma = part.sigma.view(-1, 1, 1)
    noise = (part.x - (1 - sigma) * part.x0) / sigma
    for one in comfy.utils.unpack_latents(noise, part.shapes):
        assert one.std() == pytest.approx(1, abs=0.1) and one.mean() == pytest.approx(0, abs=0.1)


def test_noise_offset_shifts_each_channel_of_each_part():
    model = model_zoo.build("LTXAV")
    samples = dataset.collect(av_latents(*LTXAV), [model_zoo.conditioning("LTXAV")])
    (plain,), (shifted,) = passes(model, samples), passes(model, samples, noise_offset=0.5)
    added = (shifted.x - plain.x) / plain.sigma.view(-1, 1, 1)
    for one in comfy.utils.unpack_latents(added, plain.shapes):
        channels = one.flatten(2)
        assert torch.allclose(channels, channels[..., :1].expand_as(channels), atol=1e-4)
        assert channels[..., 0].std() == pytest.approx(0.5, rel=0.4)


def test_shapes_that_pack_to_one_length_are_not_batched_together():
    samples = dataset.collect(av_latents(((8, 2, 2), (4, 4)), ((8, 1, 4), (4, 4))), [model_zoo.conditioning("LTXAV")])
    assert samples[0].latent.shape == samples[1].latent.shape
    assert dataset.buckets(samples) == [[0], [1]]


if hasattr(minimax, "time_shift_slope"):

    def test_sound_on_a_schedule_of_its_own():
        """MiniMax H3. A level b in 0 to 1 shifted by s is s b / (1 + (s - 1) b); pictures 12, sound 3."""
        model = model_zoo.build("MiniMaxH3")
        shapes = model_zoo.PARTS["MiniMaxH3"]
        samples = dataset.collect(av_latents(shapes), [model_zoo.conditioning("MiniMaxH3")])
        (part,) = passes(model, samples, batch_size=1)
        (clean,) = [one.latent for one in samples]
        split = torch.Size(shapes[0]).numel()

        def sound_level(level: float) -> float:
            b = level / (12 - 11 * level)
            return 3 * b / (1 + 2 * b)

        level = float(part.sigma)
        slope = (sound_level(level + 1e-6) - sound_level(level - 1e-6)) / 2e-6
        noise = (part.x[..., :split] - (1 - level) * clean[..., :split]) / level
        generator = torch.Generator().manual_seed(0)
        dataset.draw([[0]], 1, generator)  # as the batch did before its noise
        drawn = torch.randn(clean.shape, generator=generator)
        assert torch.allclose(noise, drawn[..., :split], atol=1e-3)
        sound = (1 - sound_level(level)) * clean[..., split:] + sound_level(level) * drawn[..., split:]
        assert torch.allclose(part.x[..., split:], sound, atol=1e-4)
        right = drawn - clean
        right[..., split:] *= slope
        denoised = model.model.model_sampling.calculate_denoised(part.sigma, right, part.x)
        assert ((denoised - part.x0) / part.c).abs().max() < 1e-3
        assert torch.allclose(part.weight[..., split:], torch.tensor(slope**-2), rtol=1e-3)

else:

    def test_sound_comes_in_on_the_pictures_schedule():
        """MiniMax H3 as ComfyUI 0.33 has it: by the ratio of the shifts, 12 and 3."""
        model = model_zoo.build("MiniMaxH3")
        shapes = model_zoo.PARTS["MiniMaxH3"]
        samples = dataset.collect(av_latents(shapes), [model_zoo.conditioning("MiniMaxH3")])
        (part,) = passes(model, samples, batch_size=1)
        split = torch.Size(shapes[0]).numel()
        assert torch.equal(part.x0[..., :split], samples[0].latent[..., :split])
        assert torch.equal(part.x0[..., split:], 4 * samples[0].latent[..., split:])


def test_models_that_take_pictures_alone_refuse_them():
    model, caption = small_model(), model_zoo.conditioning("SD15")
    samples = dataset.collect(av_latents(*LTXAV), [caption])
    settings = TrainingSettings(steps=1, learning_rate=0.01, batch_size=1)
    with torch.inference_mode(), pytest.raises(SodaTrainingError, match="have 2 parts.* takes one"):
        dataset.must_fit(samples, model)
        train_adapter(Task(model, samples, settings, "lq", 2), TrainingProgress(1, None))


class RedAndGreen:
    """Decodes a video latent to its first channels as colours."""

    def decode(self, latent):
        assert latent.shape == (1, 128, 1, 8, 8)
        return latent[:, :3].movedim(1, -1)


def test_a_sample_is_made_of_the_pictures():
    model = model_zoo.build("LTXAV")
    prompt = preview.SamplePrompt(None, RedAndGreen(), "", 1)
    prompt.__dict__["conditioning"] = (model_zoo.conditioning("LTXAV"),) * 2
    samples = dataset.collect(av_latents(*LTXAV), [model_zoo.conditioning("LTXAV")])
    assert preview.sample(model, prompt, samples[0].shapes).size == (8, 8)
