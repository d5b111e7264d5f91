"""A step's batch: everything that is drawn at random, and what follows from it, as tensors on the model's device.

All numbers are drawn on the CPU from a generator of the seed and the batch's index alone, so that a run can go on
from any step, and devices agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from ...errors import SodaTrainingError
from ...training.objective import min_snr
from ...training.settings import TrainingSettings
from .dataset import Sample, buckets, draw
from .nested import Shapes, shared_noise, tell
from .own_schedules import on_own_schedules

SEED_LIMIT = 2**63
Conditions = Callable[[list, torch.Tensor, Shapes], dict]  # of a caption and a latent as the model takes it


class Caption(NamedTuple):
    """As ComfyUI encodes it, and its words, if known."""

    encoded: list
    text: str


@dataclass(frozen=True)
class Pass:
    """Samples alike in shape and condition, for one forward; `(B, ...)`.

    x: the noisy latent, x0 the clean one. sigma `(B,)`: the noise levels. c, weight `(B, 1 ...)`: the output's factor
    in the denoised sample, and the weight of its squared error. nothing: the mean error of an output of 0. share: of
    the whole batch. shapes: of each latent's parts. captions: what the condition says of each sample, if asked for.
    """

    x: torch.Tensor
    x0: torch.Tensor
    sigma: torch.Tensor
    c: torch.Tensor
    weight: torch.Tensor
    nothing: torch.Tensor
    condition: dict
    share: float
    shapes: Shapes
    captions: Sequence[Caption]


@dataclass(frozen=True)
class Batch:
    """The passes of one batch, and those on prior data, if there is any."""

    passes: list[Pass]
    prior: list[Pass]


class Batches:
    """batches(i) is batch i of a run on a loaded model. Made and called outside inference mode.

    `empty` is the caption that caption dropout puts in a sample's place. Samples and captions stay on the device. With
    `words` the passes tell their captions.
    """

    def __init__(
        self, patcher: ModelPatcher, samples: Sequence[Sample], settings: TrainingSettings, empty: list | None = None,
        prior: Sequence[Sample] = (), words: bool = False,
    ):  # fmt: skip
        self.settings = settings
        self.data = _Data(patcher, samples, settings, empty, words)
        self.prior = _Data(patcher, prior, settings, empty, words) if prior else None

    def __call__(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed((self.settings.seed * 1_000_003 + index) % SEED_LIMIT)
        passes = self.data.passes(generator)
        return Batch(passes, [] if self.prior is None else self.prior.passes(generator))


class _Data:
    """Samples as the model takes them, and the passes drawn from them."""

    def __init__(
        self, patcher: ModelPatcher, samples: Sequence[Sample], settings: TrainingSettings, empty: list | None,
        words: bool,
    ):  # fmt: skip
        self.words = words
        self.patcher, self.model, self.device, self.settings = patcher, patcher.model, patcher.load_device, settings
        self.groups = buckets(samples)
        self.latents = [self._latent(s) for s in samples]
        self.shapes = [s.shapes for s in samples]
        self.captions = [Caption(s.caption, s.text) for s in samples]
        self.empty = None if empty is None else Caption(empty, "")
        self._known: dict[tuple, dict] = {}

    def _latent(self, sample: Sample) -> torch.Tensor:
        tell(self.model, sample.shapes)
        return self.model.process_latent_in(sample.latent.float()).to(self.device)

    def passes(self, generator: torch.Generator) -> list[Pass]:
        settings, sampling = self.settings, self.model.model_sampling
        batch = draw(self.groups, settings.batch_size, generator)
        x0, shapes = torch.cat([self.latents[i] for i in batch]), self.shapes[batch[0]]
        noise = torch.randn(x0.shape, generator=generator)
        levels = settings.timesteps.draw(len(batch), generator).tolist()
        sigma = torch.tensor([float(sampling.percent_to_sigma(p)) for p in levels], device=self.device)
        captions = [self.captions[i] for i in batch]
        if settings.caption_dropout and self.empty is not None:
            dropped = torch.rand(len(batch), generator=generator) < settings.caption_dropout
            captions = [self.empty if d else c for d, c in zip(dropped, captions, strict=True)]
        said = [(c, self._condition(c, i)) for i, c in zip(batch, captions, strict=True)]
        if settings.noise_offset:
            noise = noise + settings.noise_offset * shared_noise(shapes, len(batch), generator)
        noise = noise.to(self.device)
        return [
            self._pass(x0[rows], noise[rows], sigma[rows], [said[row] for row in rows], len(batch), shapes)
            for rows in _alike([found for _, found in said])
        ]

    def _pass(
        self, x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, said: list[tuple[Caption, dict]], count: int,
        shapes: Shapes,
    ) -> Pass:  # fmt: skip
        captions, conditions = zip(*said, strict=True)
        sampling = self.model.model_sampling
        one = torch.ones_like(x0.flatten(1)[:, :1]).view(-1, *(1 for _ in x0.shape[1:]))
        zero = torch.zeros_like(one)
        c = sampling.calculate_denoised(sigma, one, zero) - sampling.calculate_denoised(sigma, zero, zero)
        weight = one
        if self.settings.min_snr_gamma:
            signal, noisy = sampling.noise_scaling(sigma, zero, one), sampling.noise_scaling(sigma, one, zero)
            weight = min_snr((signal / noisy).square(), c, self.settings.min_snr_gamma)
        x = sampling.noise_scaling(sigma, noise, x0)
        x, x0, weight = on_own_schedules(self.patcher, shapes, sigma, noise, x, x0, weight)
        without = sampling.calculate_denoised(sigma, torch.zeros_like(x), x)
        nothing = (((without - x0) / c).square() * weight).mean()
        told = captions if self.words else ()
        condition, share = comfy.samplers.cond_cat(conditions), len(x0) / count
        return Pass(x, x0, sigma, c, weight, nothing, condition, share, shapes, told)

    def _condition(self, caption: Caption, sample: int) -> dict:
        """Computed once per caption and shape."""
        key = (id(caption.encoded), self.shapes[sample])
        if key not in self._known:
            self._known[key] = condition(
                self.model, self.device, self.settings.seed, caption.encoded, self.latents[sample], self.shapes[sample]
            )
        return self._known[key]


def condition(model, device: torch.device, seed: int, caption: list, latent: torch.Tensor, shapes: Shapes) -> dict:
    """What a model is conditioned on by a caption, for a latent (1, C, H, W) or one of several parts, packed;
    differentiable in the caption. Raises SodaTrainingError for a model that takes no latents of several parts."""
    conds = {"positive": comfy.sampler_helpers.convert_cond([caption])}
    conds = comfy.samplers.process_conds(
        model, torch.zeros_like(latent), conds, device, latent, seed=seed, latent_shapes=tell(model, shapes)
    )
    found = conds["positive"][0]["model_conds"]
    if len(shapes) > 1 and "latent_shapes" not in found:
        raise SodaTrainingError(
            f"The latents have {len(shapes)} parts, as a video with its sound has, but {type(model).__name__} takes "
            "one. Wire the latent of one part."
        )
    return {name: _trainable(value.process_cond(batch_size=1, area=None), device) for name, value in found.items()}


def _alike(conditions: Sequence[dict]) -> list[list[int]]:
    """Rows of the batch whose conditions fit into one forward."""
    groups: list[list[int]] = []
    for row, condition in enumerate(conditions):
        for group in groups:
            if comfy.samplers.cond_equal_size(conditions[group[0]], condition):
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


def _trainable(value, device: torch.device):
    """A COND object whose tensors lie on `device` and may be saved for a backward pass."""

    def own(part):
        return part.to(device, copy=True) if isinstance(part, torch.Tensor) else part

    if isinstance(value.cond, list):
        return value._copy_with([own(part) for part in value.cond])
    return value._copy_with(own(value.cond)) if isinstance(value.cond, torch.Tensor) else value
