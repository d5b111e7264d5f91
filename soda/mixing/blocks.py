"""Weights by block: {"output_blocks.1": 0.8, "attn2": 0.5, "*": 0.2}.

A pattern is a run of whole parts of a layer's dotted path, anywhere in it: "output_blocks.1" is in
"diffusion_model.output_blocks.1.1.proj" and not in "...output_blocks.10.0...". The longest pattern in a path gives
the layer its weight, "*" all that is left; without "*" that is 0.

The B-LoRA split: of SDXL's transformer blocks, the first after the middle carries content and layout, the second
style and colours (arXiv 2403.14572, W_0^4 and W_0^5). Its authors' code names them up_blocks.0.attentions.0 and .1;
the original implementation, whose names ComfyUI keeps, calls them output_blocks.0.1 and output_blocks.1.1.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..adapter import Adapter
from ..errors import SodaMixError

Weight = float | Mapping[str, float]
REST = "*"
# modelspec architecture of the base -> role -> the block that carries it, in the names of diffusers and of ComfyUI
SPLITS = {
    "stable-diffusion-xl-v1-base": {
        "subject": ("up_blocks.0.attentions.0", "output_blocks.0.1"),
        "style": ("up_blocks.0.attentions.1", "output_blocks.1.1"),
    }
}


def matches(pattern: str, layer: str) -> bool:
    """Whether the pattern is a run of whole parts of the layer's path, the rows `[a:b]` of a fused weight aside."""
    return pattern == REST or f".{pattern}." in f".{layer.partition('[')[0]}."


def layer_weight(weight: Weight, layer: str) -> float:
    """The weight of one layer. Raises SodaMixError if two patterns of equal length claim it."""
    if not isinstance(weight, Mapping):
        return weight
    found = [pattern for pattern in weight if pattern != REST and matches(pattern, layer)]
    found.sort(key=lambda pattern: (len(pattern), pattern))
    if not found:
        return weight.get(REST, 0.0)
    if len(found) > 1 and len(found[-1]) == len(found[-2]):
        raise SodaMixError(
            f"layer {layer!r} is in the blocks {found[-2]!r} and {found[-1]!r}, and neither pattern is longer; "
            "write one of them out further"
        )
    return weight[found[-1]]


def check_weight(adapter: Adapter, weight: Weight) -> None:
    """Raises SodaMixError if a number is not finite or a pattern finds no layer of the adapter."""
    for number in weight.values() if isinstance(weight, Mapping) else (weight,):
        if not abs(number) < float("inf"):
            raise SodaMixError(f"the weight of {adapter.name!r} is {number}; give a finite number")
    for pattern in weight if isinstance(weight, Mapping) else ():
        if not any(matches(pattern, layer) for layer in adapter.layers):
            example = next(iter(adapter.layers), "none")
            raise SodaMixError(
                f"{adapter.name!r} has no layer in the block {pattern!r}; its layers are named like {example!r}"
            )


def b_lora(adapter: Adapter, weight: float = 1.0) -> dict[str, float]:
    """The B-LoRA split as weights by block: all of `weight` where the adapter's role is carried, 0 elsewhere.

    B-LoRA trains these blocks alone; an adapter trained on all layers leaves behind what it learned in others. To
    keep a part of that: `{**b_lora(adapter), "*": 0.3}`.
    Raises SodaMixError for an architecture without a known split, a role other than subject or style, or an adapter
    without a layer in the block.
    """
    architecture = adapter.metadata.get("modelspec.architecture", "").split("/")[0]
    split = SPLITS.get(architecture)
    if split is None:
        raise SodaMixError(
            f"which blocks carry style and which the subject is known for {', '.join(SPLITS)} and not for "
            f"{architecture or 'an adapter that does not name its architecture'} ({adapter.name!r}); "
            "give its weights by block yourself"
        )
    if adapter.role not in split:
        raise SodaMixError(
            f"{adapter.name!r} has the role {adapter.role!r}, and no block is known for it; give it the role "
            f"{' or '.join(split)}"
        )
    blocks = [block for block in split[adapter.role] if any(matches(block, layer) for layer in adapter.layers)]
    if not blocks:
        raise SodaMixError(
            f"{adapter.name!r} has no layer in {' or '.join(split[adapter.role])}, the block of a {adapter.role}; "
            "give its weights by block yourself"
        )
    return dict.fromkeys(blocks, weight)
