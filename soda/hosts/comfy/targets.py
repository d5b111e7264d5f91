"""Which weights of a ComfyUI model SODA adapts: the attention projections of the diffusion model, all or a part,
and of a text encoder."""

from __future__ import annotations

import re

from comfy.model_patcher import ModelPatcher

from ...errors import SodaTrainingError
from .attention import projections
from .base import shapes

# Where the picture attends to the text: the cross-attentions of models that have them (attn2 of a UNet; SD 3 calls a
# second self-attention so), the text stream's projections in models that attend to both at once. The rest, single
# streams of both included, counts as self-attention.
CROSS = re.compile(
    r"""(?<!x_block)[._]attn2\. | [._]cross_att | \.block\d+\.blocks\.1\.block\.attn\.
    | \.txt_attn\. | \.context_block\. | \.attn\.txt_ | \.attn\.proj_\w+\.txt | \.(?:qkv|proj)_y(?:\[|$)
    | \.add_[qkv]_proj | \.to_add_out | \.to_\w+_t$ | \.instruct_ | \.double_layers\.\d+\.attn\.w1""",
    re.VERBOSE,
)
# What a text encoder that also sees or hears has beside its text model.
OTHER_SENSES = re.compile(r"\.(?:visual|vision_model|multi_modal_projector|audio\w*)\.")
TARGETS = ("all attention", "cross-attention", "self-attention")


def attention_weights(patcher: ModelPatcher, targets: str = "all attention") -> dict[str, str]:
    """Layer name -> state dict key of the attention projections (see `attention`); `targets` is one of TARGETS.

    The layer name is the module path, with [a:b] for rows a to b of a fused weight, as it stands in adapter files. In
    the order of the model's state dict. Raises SodaTrainingError if the model has none, or does not tell
    cross-attention from self-attention.
    """
    model = type(patcher.model).__name__
    found = projections(shapes(patcher))
    if not found:
        raise SodaTrainingError(f"The model {model} has no attention projections, so there is nothing to train.")
    if targets == "all attention":
        return found
    cross = {layer: key for layer, key in found.items() if CROSS.search(layer)}
    if not cross or len(cross) == len(found):
        raise SodaTrainingError(
            f"The model {model} attends to picture and text through the same weights, so that {targets} is not a part "
            "of its own; set targets to 'all attention'."
        )
    return cross if targets == "cross-attention" else {k: v for k, v in found.items() if k not in cross}


def text_attention_weights(patcher: ModelPatcher) -> dict[str, str]:
    """The same for the patcher of a CLIP. Raises SodaTrainingError if it has none."""
    found = {k: v for k, v in projections(shapes(patcher), "").items() if not OTHER_SENSES.search(v)}
    if not found:
        raise SodaTrainingError(
            f"The text encoder {type(patcher.model).__name__} has no attention projections; set text_encoder_rate to 0."
        )
    return found
