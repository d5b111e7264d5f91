"""A sample with the adapter as it is now, made during training through ComfyUI's own sampling."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image

from . import nested

if TYPE_CHECKING:
    from .nested import Shapes
    from .progress import TrainingProgress

log = logging.getLogger(__name__)
STEPS = 20
CFG = 4.0
LARGEST = 512  # pixels on the node
QUARTERS = 4
GIB = 1024**3


@dataclass(frozen=True)
class SamplePrompt:
    """What to sample with and when: the CLIP and VAE wired to the node, the prompt, a seed, the steps from one sample
    to the next (0: one at each quarter of the training)."""

    clip: Any
    vae: Any
    text: str
    seed: int
    every: int = 0

    def due(self, step: int, steps: int) -> bool:
        """Whether a sample comes after `step`, counted from 0; there is one after the last step in any case."""
        done = step + 1
        if self.every:
            return done % self.every == 0 or done == steps
        return done * QUARTERS // steps > step * QUARTERS // steps

    @cached_property
    def conditioning(self) -> tuple[list, list]:
        """Positive and negative, encoded once: the text encoder would push the model that trains out of the memory."""
        with torch.inference_mode():
            return tuple(self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text)) for text in (self.text, ""))


def show_sample(
    patcher: ModelPatcher, prompt: SamplePrompt, shapes: Shapes, step: int, progress: TrainingProgress,
    reload: Callable[[], object],
) -> None:  # fmt: skip
    """Show a sample made after `step` on the node; `shapes` are those of the latent as the VAE gives it. `reload()`
    loads the model for training again.

    It is a courtesy: one that would not fit into the memory, or fails, is told there and does not end the training.
    """
    started = time.monotonic()
    try:
        missing = _missing_memory(patcher, prompt, shapes)
        if missing > 0:
            progress.note(f"No sample after step {step + 1}: it needs {missing / GIB:.1f} GiB more memory.")
        else:
            progress.preview(step, sample(patcher, prompt, shapes))
    except Exception as error:
        log.exception("The sample after step %d failed", step + 1)
        out_of_memory = comfy.model_management.is_oom(error)
        progress.note(f"The sample after step {step + 1} failed: {'out of memory' if out_of_memory else error}")
    finally:
        comfy.model_management.soft_empty_cache()
        reload()
        patcher.pre_run()
        progress.pause(time.monotonic() - started)


def sample(patcher: ModelPatcher, prompt: SamplePrompt, shapes: Shapes) -> Image.Image:
    """One image of `patcher` with the weights it computes with now."""
    with torch.inference_mode():
        positive, negative = prompt.conditioning
        latent = nested.empty(shapes)
        noise = comfy.sample.prepare_noise(latent, prompt.seed)
        result = comfy.sample.sample(
            patcher, noise, STEPS, CFG, "euler", "normal", positive, negative, latent,
            disable_pbar=True, seed=prompt.seed,
        )  # fmt: skip
        return image_of(prompt.vae.decode(nested.first(result)))


def image_of(pixels: torch.Tensor) -> Image.Image:
    """The first image of a ComfyUI IMAGE tensor, (B, H, W, 3) in 0 to 1, or of a video decoded to (B, T, H, W, 3)."""
    first = pixels.reshape(-1, *pixels.shape[-3:])[0]
    return Image.fromarray((first.clamp(0, 1) * 255).round().to(device="cpu", dtype=torch.uint8).numpy())


def _missing_memory(patcher: ModelPatcher, prompt: SamplePrompt, shapes: Shapes) -> float:
    """Bytes that are short for sampling with guidance and then decoding beside the model that trains; ≤ 0: none.

    By ComfyUI's own estimates, with the margin that it keeps on a GPU before it unloads other models.
    """
    device = patcher.load_device
    vae = prompt.vae
    decoding = vae.memory_used_decode(shapes[0], vae.vae_dtype) + vae.patcher.model_size()
    needed = max(sum(patcher.memory_required([2 * shape[0], *shape[1:]]) for shape in shapes), decoding)
    if not comfy.model_management.is_device_cpu(device):
        needed += comfy.model_management.minimum_inference_memory()
    return needed - comfy.model_management.get_free_memory(device)
