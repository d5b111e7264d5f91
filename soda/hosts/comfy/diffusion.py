"""The training loss of a ComfyUI diffusion model, whatever it predicts (noise, velocity, flow, x0).

The model's own sampling object turns its output into a denoised sample, x0_pred = a x + c output. Dividing the
error of x0_pred by c gives the error of the output itself, so loss = mean(((x0_pred - x0) / c)^2) is the model's own
training loss without knowing its prediction type; c is read off numerically.
"""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher

from .dataset import Sample, buckets, draw

SEED_LIMIT = 2**63


class DiffusionLoss:
    """loss(step) of a loaded model on a random batch; the batch depends on seed and step alone.

    `patcher` is a clone made for this: it gets an attention that trains well, for samples on the way too. Samples
    and captions stay on the model's device. Made and called outside inference mode.
    """

    def __init__(self, patcher: ModelPatcher, samples: Sequence[Sample], batch_size: int, seed: int):
        self.patcher = patcher
        self.model = patcher.model
        self.device = patcher.load_device
        self.batch_size = batch_size
        self.seed = seed
        self.groups = buckets(samples)
        self.latents = [self.model.process_latent_in(s.latent.float()).to(self.device) for s in samples]
        self.conditions = self._encode(samples)
        self.options = patcher.model_options["transformer_options"]
        # ComfyUI's attention for CPUs is tens of times slower to train through; some for GPUs know no backward pass.
        self.options.setdefault("optimized_attention_override", _torch_attention)

    def __call__(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % SEED_LIMIT)
        batch = draw(self.groups, self.batch_size, generator)
        x0 = torch.cat([self.latents[i] for i in batch])
        noise = torch.randn(x0.shape, generator=generator).to(self.device)
        sigma = self._sigmas(len(batch), generator)
        total = torch.zeros((), device=self.device)
        for rows in self._alike(batch):
            part = self._loss(x0[rows], noise[rows], sigma[rows], [self.conditions[batch[row]] for row in rows])
            total = total + part * (len(rows) / len(batch))
        return total

    def _loss(self, x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, conditions: list) -> torch.Tensor:
        sampling = self.model.model_sampling
        x = sampling.noise_scaling(sigma, noise, x0)
        condition = comfy.samplers.cond_cat(conditions)
        options = self.options | {"sigmas": sigma, "cond_or_uncond": [0], "sample_sigmas": sigma}
        denoised = self.model.apply_model(x, sigma, transformer_options=options, **condition)
        one, zero = torch.ones_like(x0), torch.zeros_like(x0)
        c = sampling.calculate_denoised(sigma, one, zero) - sampling.calculate_denoised(sigma, zero, zero)
        return ((denoised.float() - x0) / c).square().mean()

    def _sigmas(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Noise levels spread evenly over the schedule (one random shift), which steadies the loss of small batches."""
        shift = torch.rand((), generator=generator, dtype=torch.float64)
        order = torch.randperm(count, generator=generator).double()
        percents = ((order + shift) / count).clamp(1e-4, 1.0 - 1e-4)
        sampling = self.model.model_sampling
        return torch.tensor([float(sampling.percent_to_sigma(p)) for p in percents.tolist()], device=self.device)

    def _encode(self, samples: Sequence[Sample]) -> list[dict]:
        """What the model is conditioned on, per sample; computed once per caption and latent shape."""
        known: dict[tuple, dict] = {}
        out = []
        for sample, latent in zip(samples, self.latents, strict=True):
            key = (id(sample.caption), tuple(latent.shape))
            if key not in known:
                known[key] = self._condition(sample.caption, latent)
            out.append(known[key])
        return out

    def _condition(self, caption: list, latent: torch.Tensor) -> dict:
        conds = {"positive": comfy.sampler_helpers.convert_cond([caption])}
        noise = torch.zeros_like(latent)
        conds = comfy.samplers.process_conds(self.model, noise, conds, self.device, latent, seed=self.seed)
        encoded = conds["positive"][0]["model_conds"]
        return {name: _trainable(value.process_cond(batch_size=1, area=None)) for name, value in encoded.items()}

    def _alike(self, batch: Sequence[int]) -> list[list[int]]:
        """Rows of the batch whose conditions fit into one forward."""
        groups: list[list[int]] = []
        for row, index in enumerate(batch):
            for group in groups:
                if comfy.samplers.cond_equal_size(self.conditions[batch[group[0]]], self.conditions[index]):
                    group.append(row)
                    break
            else:
                groups.append([row])
        return groups


def _trainable(value):
    """A COND object whose tensors may be saved for a backward pass."""
    if isinstance(value.cond, torch.Tensor) and value.cond.is_inference():
        return value._copy_with(value.cond.clone())
    if isinstance(value.cond, list):
        return value._copy_with([t.clone() if isinstance(t, torch.Tensor) else t for t in value.cond])
    return value


def _torch_attention(_, *args, **kwargs):
    return attention_pytorch(*args, **kwargs)
