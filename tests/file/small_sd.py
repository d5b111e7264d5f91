"""A narrow SD 1.x UNet's attention weights under the names of checkpoints and of diffusers, and adapters for it."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import Tensor

from soda.adapter import Adapter, Layer
from soda.decomposition import decompose, spectral_change
from soda.fingerprint import sketch
from soda.kronecker import factor_sizes

CONTEXT = 12
# (LDM block, diffusers block, width), in the order in which diffusers registers the modules.
BLOCKS = (
    [(f"input_blocks.{n}.1", f"down_blocks.{x}.attentions.{i}", w)
     for n, x, i, w in ((1, 0, 0, 8), (2, 0, 1, 8), (4, 1, 0, 16), (5, 1, 1, 16), (7, 2, 0, 24), (8, 2, 1, 24))]
    + [(f"output_blocks.{n}.1", f"up_blocks.{n // 3}.attentions.{n % 3}", 24 if n < 6 else 16 if n < 9 else 8)
       for n in range(3, 12)]
    + [("middle_block.1", "mid_block.attentions.0", 24)]
)  # fmt: skip
PARTS = ("to_q", "to_k", "to_v", "to_out.0")


def modules() -> list[tuple[str, str, tuple[int, int]]]:
    """(LDM path, diffusers path, (out, in)) of the 128 projections, in diffusers' order."""
    found = []
    for ldm, diffusers, width in BLOCKS:
        for attention in ("attn1", "attn2"):
            for part in PARTS:
                inputs = CONTEXT if attention == "attn2" and part in ("to_k", "to_v") else width
                tail = f"transformer_blocks.0.{attention}.{part}"
                found.append((f"{ldm}.{tail}", f"{diffusers}.{tail}", (width, inputs)))
    return found


def base_weights(seed: int = 0) -> dict[str, Tensor]:
    """Random weights by the layer names of adapters."""
    g = torch.Generator().manual_seed(seed)
    return {f"diffusion_model.{ldm}": torch.randn(shape, generator=g) for ldm, _, shape in modules()}


def save_base(path, weights: dict[str, Tensor], names: str = "checkpoint") -> None:
    """Write weights as a file in names `checkpoint`, `comfy`, `ldm`, `diffusers` or `pipeline`."""
    to_diffusers = {f"diffusion_model.{ldm}": diffusers for ldm, diffusers, _ in modules()}
    spell = {
        "checkpoint": lambda name: f"model.{name}",
        "comfy": lambda name: name,
        "ldm": lambda name: name.removeprefix("diffusion_model."),
        "diffusers": lambda name: to_diffusers[name],
        "pipeline": lambda name: f"unet.{to_diffusers[name]}",
    }[names]
    save_file({f"{spell(name)}.weight": weight.contiguous() for name, weight in weights.items()}, path)


def adapter(weights: dict[str, Tensor], decomposition="lq", seed: int = 1, size: float = 0.2) -> Adapter:
    """A random adapter for the weights, with sketches."""
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for name, weight in weights.items():
        width = weight.shape[0 if decomposition == "qr" else 1]
        logs = tuple(size * torch.randn(n * (n - 1) // 2, generator=g) for n in factor_sizes(width, 3))
        delta = change = None
        basis = decompose(weight, decomposition)
        if basis is not None:
            delta = size * torch.randn(min(weight.shape), generator=g)
            change = sketch(spectral_change(basis, delta, weight))
        layers[name] = (Layer(decomposition, delta, logs, change),)
    return Adapter(layers, {"soda.role": "style", "soda.base_model": "narrow"}, "one")
