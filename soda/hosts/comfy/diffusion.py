"""The errors of a ComfyUI diffusion model on a batch, whatever it predicts (noise, velocity, flow, x0).

The model's own sampling object turns its output into a denoised sample, x0_pred = a x + c output. Dividing the
error of x0_pred by c gives the error of the output itself, so the mean of ((x0_pred - x0) / c)^2 is the model's own
training loss without knowing its prediction type.

A batch is prepared by `batches`; what is here depends on its tensors alone: it draws nothing and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher

from ...training.objective import dco
from ...training.run import Losses
from ...training.settings import TrainingSettings
from .batches import Batch, Pass, condition
from .inject import Injection
from .prompt_cache import forget
from .text_encoder import TextEncoder


def transformer_options(patcher: ModelPatcher) -> dict:
    """The options of `patcher`, a clone made for training, with an attention that trains well.

    ComfyUI's attention for CPUs is tens of times slower to train through; some for GPUs know no backward pass.
    """
    options = patcher.model_options["transformer_options"]
    options.setdefault("optimized_attention_override", _torch_attention)
    return options


def squared_errors(patcher: ModelPatcher, part: Pass) -> torch.Tensor:
    """((x0_pred - x0) / c)^2 `(B, ...)` in the latent's shape, fp32, under the weights as they are."""
    options = transformer_options(patcher) | {
        "sigmas": part.sigma, "cond_or_uncond": [0], "sample_sigmas": part.sigma
    }  # fmt: skip
    denoised = patcher.model.apply_model(part.x, part.sigma, transformer_options=options, **part.condition)
    forget(patcher)  # the next pass has other weights
    return ((denoised.float() - part.x0) / part.c).square()


def mean_error(patcher: ModelPatcher, passes: Sequence[Pass]) -> torch.Tensor:
    """The weighted mean of the squared errors of all passes, a scalar."""
    total = torch.zeros((), device=patcher.load_device)
    for part in passes:
        total = total + (squared_errors(patcher, part) * part.weight).mean() * part.share
    return total


class DiffusionLosses:
    """What a run minimises and is judged by, as functions of the adapted weights and a batch.

    `reference` are the weights without the new adapter, which dco compares with: the same model, run once more. With a
    `text` encoder that trains along, the captions go through its adapted weights as well.
    """

    def __init__(
        self, patcher: ModelPatcher, injection: Injection, settings: TrainingSettings,
        reference: Mapping[str, torch.Tensor], text: TextEncoder | None = None,
    ):  # fmt: skip
        self.patcher, self.injection, self.settings, self.reference = patcher, injection, settings, reference
        self.text = text
        self._conditions = partial(condition, patcher.model, patcher.load_device, settings.seed)

    def __call__(self, weights: Mapping[str, torch.Tensor], batch: Batch) -> Losses:
        error = loss = self._error(weights, batch.passes)
        if self.settings.loss == "dco":
            with torch.no_grad():
                reference = self._error(self.reference, batch.passes)
            loss = dco(error, reference, self.settings.beta)
        if batch.prior:
            loss = loss + self.settings.prior_weight * self._error(weights, batch.prior)
        nothing = torch.stack([part.nothing * part.share for part in batch.passes]).sum()
        return Losses(loss, error, nothing)

    def _error(self, weights: Mapping[str, torch.Tensor], passes: Sequence[Pass]) -> torch.Tensor:
        self.injection.weights = weights
        if self.text is not None:
            self.text.weights = weights
            passes = self.text.passes(passes, self._conditions)
        return mean_error(self.patcher, passes)


def _torch_attention(_, *args, **kwargs):
    return attention_pytorch(*args, **kwargs)
