"""Small models whose attention weights are stored in ComfyUI's quantised formats, loaded through its own operations."""

from __future__ import annotations

import json

import comfy.ops
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from small_models import small_model, weights
from soda_pack.soda.hosts.comfy.targets import attention_weights

FORMATS = tuple(QUANT_ALGOS)
RAW = (torch.float8_e4m3fn, torch.float8_e5m2)
WIDTH = 64
GROUP = 64  # the block formats ask for multiples of it


def quantised_model(form, seed: int = 0):
    """`small_model` with its attention weights in a format of ComfyUI's or, for a dtype, merely cast to it."""
    plain = small_model(seed, WIDTH)
    attention = set(attention_weights(plain).values())
    if form in RAW:
        model = small_model(seed, WIDTH, operations=comfy.ops.manual_cast)
        with torch.inference_mode():
            for key in attention:
                parameter = model.model.get_parameter(key)
                parameter.data = parameter.data.to(form)
        return model
    # As ComfyUI itself does where a device has no fast kernels for them, such as a CPU.
    emulated = {"nvfp4", "mxfp8", *(name for name in FORMATS if name.startswith("float8"))}
    operations = comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32, disabled=emulated)
    model = small_model(seed, WIDTH, operations=operations)
    stored = {}
    with torch.inference_mode():
        for key, weight in weights(plain).items():
            stored[key] = weight
            if key in attention and weight.shape[1] % GROUP == 0:
                layout = QUANT_ALGOS[form]["comfy_tensor_layout"]
                options = {"convrot_groupsize": GROUP} if form == "convrot_w4a4" else {"scale": "recalculate"}
                stored.pop(key)
                stored.update(QuantizedTensor.from_float(weight, layout, **options).state_dict(key))
                conf = json.dumps({"format": form, **options}).encode()
                stored[key.removesuffix("weight") + "comfy_quant"] = torch.tensor(list(conf), dtype=torch.uint8)
        missing, unexpected = model.model.load_state_dict(stored, strict=False)
    assert not missing and not unexpected
    return model
