"""A sample with the adapter as it is now, made during training through ComfyUI's own sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image

STEPS = 20
CFG = 4.0
LARGEST = 512  # pixels on the node


@dataclass(frozen=True)
class SamplePrompt:
    """What to sample with: the CLIP and VAE wired to the node, the prompt, a seed."""

    clip: Any
    vae: Any
    text: str
    seed: int


def sample(patcher: ModelPatcher, prompt: SamplePrompt, latent_shape: tuple[int, ...]) -> Image.Image:
    """One image of `patcher` with the weights it computes with now; latent_shape (1, C, H, W) as the VAE gives it."""
    with torch.inference_mode():
        positive, negative = (_encode(prompt.clip, text) for text in (prompt.text, ""))
        latent = torch.zeros(latent_shape)
        noise = comfy.sample.prepare_noise(latent, prompt.seed)
        result = comfy.sample.sample(
            patcher, noise, STEPS, CFG, "euler", "normal", positive, negative, latent,
            disable_pbar=True, seed=prompt.seed,
        )  # fmt: skip
        return image_of(prompt.vae.decode(result))


def image_of(pixels: torch.Tensor) -> Image.Image:
    """The first image of a ComfyUI IMAGE tensor, (B, H, W, 3) in 0 to 1, or of a video decoded to (B, T, H, W, 3)."""
    first = pixels.reshape(-1, *pixels.shape[-3:])[0]
    return Image.fromarray((first.clamp(0, 1) * 255).round().to(device="cpu", dtype=torch.uint8).numpy())


def _encode(clip, text: str):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))
