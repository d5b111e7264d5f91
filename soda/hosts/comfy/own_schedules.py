"""Networks whose sound has noise on another schedule than its pictures (MiniMax H3 on ComfyUI 0.30).

Told the pictures' noise level s, such a network takes its sound to be at t(s), and its output for it is dt/ds times the
velocity n - x0, so that a sampler that knows s alone takes both parts along. A clean sound x0 with noise n is therefore
given as x = (1 - t) x0 + t n, and what the sampler should find in place of x0 is x - s dt/ds (n - x0); the error of
the output counts (dt/ds)^-2, which makes it that of the velocity.

Newer ComfyUIs take a sound to the pictures' schedule themselves, by a factor when latents come in.
"""

from __future__ import annotations

import math

import torch
from comfy.ldm.minimax import model as minimax
from comfy.model_patcher import ModelPatcher

from .nested import Shapes

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def on_own_schedules(
    patcher: ModelPatcher, shapes: Shapes, sigma: torch.Tensor, noise: torch.Tensor, x: torch.Tensor, x0: torch.Tensor,
    weight: torch.Tensor,
) -> Triple:  # fmt: skip
    """(x, x0, weight) of a pass, packed `(B, 1, N)`, with the sound on its own schedule, if the network has one."""
    network = patcher.model.diffusion_model
    if len(shapes) == 1 or not hasattr(network, "sigma_shift_audio") or not hasattr(minimax, "time_shift_slope"):
        return x, x0, weight
    options = patcher.model_options["transformer_options"]
    shifts = [
        float(options.get(f"minimax_h3_sigma_shift_{part}", getattr(network, f"sigma_shift_{part}")))
        for part in ("video", "audio")
    ]
    level = sigma.view(-1, 1, 1)
    own, slope = minimax.time_shift_sigma(level, *shifts), minimax.time_shift_slope(level, *shifts)
    start, rest = math.prod(shapes[0][1:]), sum(math.prod(shape[1:]) for shape in shapes[1:])
    clean, noisy = x0[..., start:], noise[..., start:]
    sound = (1 - own) * clean + own * noisy
    return (
        torch.cat([x[..., :start], sound], -1),
        torch.cat([x0[..., :start], sound - level * slope * (noisy - clean)], -1),
        torch.cat([weight.expand(-1, -1, start), (weight / slope**2).expand(-1, -1, rest)], -1),
    )
