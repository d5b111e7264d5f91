"""Which weights of a ComfyUI model SODA adapts: the attention projections of the diffusion model."""

from __future__ import annotations

import re

from comfy.model_patcher import ModelPatcher

from ...errors import SodaTrainingError

PROJECTION = re.compile(r"^(diffusion_model\..+\.(?:to_q|to_k|to_v|to_out\.0))\.weight$")
# UNet transformer blocks attend first to the picture itself, then to the text.
TARGETS = {"all attention": "", "cross-attention": ".attn2.", "self-attention": ".attn1."}


def attention_weights(patcher: ModelPatcher, targets: str = "all attention") -> dict[str, str]:
    """Layer name -> state dict key of the attention projections, the 2-D weights to_q, to_k, to_v and to_out.0.

    `targets` is a key of TARGETS. The layer name is the module path, as it stands in adapter files. In the order of
    the model's state dict. Raises SodaTrainingError if the model has none.
    """
    found = {}
    for key, weight in patcher.model_state_dict().items():
        match = PROJECTION.match(key)
        if match and weight.ndim == 2:
            found[match.group(1)] = key
    chosen = {layer: key for layer, key in found.items() if TARGETS[targets] in layer}
    if found and not chosen:
        raise SodaTrainingError(
            f"The model {type(patcher.model).__name__} does not tell {targets} from the rest of its attention; set "
            "targets to 'all attention'."
        )
    if not found:
        raise SodaTrainingError(
            f"The model {type(patcher.model).__name__} has no attention projections named to_q, to_k, to_v or to_out, "
            "so there is nothing to train. SODA trains Stable Diffusion 1.x, 2.x, SDXL and models built like them."
        )
    return chosen
