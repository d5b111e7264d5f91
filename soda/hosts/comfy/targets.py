"""Which weights of a ComfyUI model SODA adapts: the attention projections of the diffusion model."""

from __future__ import annotations

import re

from comfy.model_patcher import ModelPatcher

from ...errors import SodaTrainingError

PROJECTION = re.compile(r"^(diffusion_model\..+\.(?:to_q|to_k|to_v|to_out\.0))\.weight$")


def attention_weights(patcher: ModelPatcher) -> dict[str, str]:
    """Layer name -> state dict key of every attention projection, a 2-D weight to_q, to_k, to_v or to_out.0.

    The layer name is the module path, as it stands in adapter files. In the order of the model's state dict.
    """
    found = {}
    for key, weight in patcher.model_state_dict().items():
        match = PROJECTION.match(key)
        if match and weight.ndim == 2:
            found[match.group(1)] = key
    if not found:
        raise SodaTrainingError(
            f"The model {type(patcher.model).__name__} has no attention projections named to_q, to_k, to_v or to_out, "
            "so there is nothing to train. SODA trains Stable Diffusion 1.x, 2.x, SDXL and models built like them."
        )
    return found
