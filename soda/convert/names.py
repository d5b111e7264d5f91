"""What one module of Stable Diffusion 1.x, 2.x and SDXL is called by whom.

| here, in ComfyUI (LDM) | in diffusers |
|---|---|
| diffusion_model.input_blocks.{1 + 3x + i}.1.P | unet.down_blocks.{x}.attentions.{i}.P, i < 2 |
| diffusion_model.middle_block.1.P | unet.mid_block.attentions.0.P |
| diffusion_model.output_blocks.{3x + i}.1.P | unet.up_blocks.{x}.attentions.{i}.P, i < 3 |
| clip_l.transformer.P, clip_g.transformer.P | text_encoder.P, text_encoder_2.P |

with P, the path within the transformer, the same. These UNets have two residual blocks per level on the way down and
three on the way up; names that others have (`[a:b]` of a fused weight included) are refused, so that the way there
and back loses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from ..adapter import Adapter
from ..errors import SodaFileError

ENCODERS = (("clip_l.transformer.", "text_encoder."), ("clip_g.transformer.", "text_encoder_2."))
NUMBER = r"(0|[1-9][0-9]{0,3})"
COMFY = re.compile(rf"diffusion_model\.(?:(input|output)_blocks\.{NUMBER}|middle_block)\.1\.([^\[\]]+)")
DIFFUSERS = re.compile(
    rf"(?:unet\.)?(?:(down|up)_blocks\.{NUMBER}\.attentions\.{NUMBER}|mid_block\.attentions\.0)\.([^\[\]]+)"
)


def to_diffusers(name: str) -> str:
    """The diffusers path of a ComfyUI layer name. Raises SodaFileError if there is none."""
    for comfy, diffusers in ENCODERS:
        if name.startswith(comfy) and "[" not in name:
            return diffusers + name[len(comfy) :]
    match = COMFY.fullmatch(name)
    if match is not None:
        side, number, path = match.groups()
        if side is None:
            return f"unet.mid_block.attentions.0.{path}"
        level, i = divmod(int(number) - (side == "input"), 3)
        if side == "output" or (level >= 0 and i < 2):
            return f"unet.{'down' if side == 'input' else 'up'}_blocks.{level}.attentions.{i}.{path}"
    raise SodaFileError(f"layer {name!r} has no name in diffusers; only attention of SD and SDXL can be renamed")


def to_comfy(name: str) -> str:
    """The ComfyUI layer name of a diffusers path, with or without `unet.`. Raises SodaFileError if there is none."""
    for comfy, diffusers in ENCODERS:
        if name.startswith(diffusers) and "[" not in name:
            return comfy + name[len(diffusers) :]
    match = DIFFUSERS.fullmatch(name)
    if match is not None:
        side, level, i, path = match.groups()
        if side is None:
            return f"diffusion_model.middle_block.1.{path}"
        if int(i) < (2 if side == "down" else 3):
            block = 3 * int(level) + int(i) + (side == "down")
            return f"diffusion_model.{'input' if side == 'down' else 'output'}_blocks.{block}.1.{path}"
    raise SodaFileError(f"layer {name!r} has no name in ComfyUI; only attention of SD and SDXL can be renamed")


def renamed(adapter: Adapter, rename: Callable[[str], str]) -> Adapter:
    """The adapter with every layer renamed by `to_diffusers` or `to_comfy`; nothing else changes."""
    return replace(adapter, layers={rename(name): terms for name, terms in adapter.layers.items()})


def diffusers_order(names: Iterable[str]) -> list[str]:
    """UNet layers in the order in which diffusers registers their modules: down, up, then the middle; within an
    attention q, k, v, out."""
    sides, parts = ("down", "up", "mid"), ("q", "k", "v", "out.0")

    def place(name: str) -> tuple:
        module, _, part = to_diffusers(name).removeprefix("unet.").rpartition(".to_")
        return sides.index(module.split("_")[0]), *map(int, re.findall("[0-9]+", module)), parts.index(part)

    return sorted(names, key=place)


def architecture(names: Iterable[str]) -> str | None:
    """`stable-diffusion-v1` (and v2, whose UNet is laid out alike), `stable-diffusion-xl-v1-base` or None, by where
    all attention of a base stands."""
    blocks = {name.split(".transformer_blocks")[0] for name in names if name.startswith("diffusion_model.")}
    for family, down, up in (
        ("stable-diffusion-v1", (1, 2, 4, 5, 7, 8), range(3, 12)),
        ("stable-diffusion-xl-v1-base", (4, 5, 7, 8), range(6)),
    ):
        layout = {f"diffusion_model.input_blocks.{n}.1" for n in down} | {"diffusion_model.middle_block.1"}
        if blocks == layout | {f"diffusion_model.output_blocks.{n}.1" for n in up}:
            return family
    return None


def kohya(name: str, family: str | None) -> str:
    """The name of a layer in LoRA files as kohya's trainer writes them and as ComfyUI and the webuis read them: made
    from diffusers names for SD 1.x and 2.x, from the checkpoint's own for all others."""
    sd1 = family == "stable-diffusion-v1"
    for number, (comfy, _) in enumerate(ENCODERS, 1):
        if name.startswith(comfy):
            return f"lora_te{'' if sd1 else number}_{name[len(comfy) :]}".replace(".", "_")
    path = to_diffusers(name).removeprefix("unet.") if sd1 else name.removeprefix("diffusion_model.")
    return f"lora_unet_{path}".replace(".", "_")
