"""Small models whose transformer blocks are stored in fewer bits, loaded through ComfyUI's own operations."""

from __future__ import annotations

import json

import comfy.ops
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from small_models import small_model, weights
from soda_pack.soda.hosts.comfy.base import unpatched

FORMATS = tuple(QUANT_ALGOS)
RAW = (torch.float8_e4m3fn, torch.float8_e5m2)
GGUF = "gguf"
WIDTH = 64
GROUP = 64  # the block formats ask for multiples of it
ROTATED = ("convrot_w4a4", "asym_w4a8_int8")  # in groups of 256, if not told otherwise
# As ComfyUI itself does where a device has no fast kernels for them, such as a CPU.
EMULATED = {"nvfp4", "mxfp8", *(name for name in FORMATS if name.startswith("float8"))}


def quantised_model(form, seed: int = 0, plain=None):
    """`plain`, else `small_model`, in one of FORMATS, merely cast to one of RAW, or packed as the GGUF pack does."""
    plain = small_model(seed, WIDTH) if plain is None else plain
    wide = {
        key for key, weight in weights(plain).items()
        if "blocks." in key and key.endswith(".weight") and weight.dim() == 2 and weight.shape[1] % GROUP == 0
    }  # fmt: skip
    if form in RAW:
        return _filled(comfy.ops.manual_cast, {k: v.to(form) if k in wide else v for k, v in weights(plain).items()})
    if form == GGUF:
        packed = {k: PackedTensor.of(v) if k in wide else v for k, v in weights(plain).items()}
        return _filled(PackedOps, packed)
    stored = {}
    for key, weight in weights(plain).items():
        if key in wide:
            with torch.inference_mode():
                stored.update(quantise(weight, form).state_dict(key))
            options = {"convrot_groupsize": GROUP} if form in ROTATED else {}
            conf = json.dumps({"format": form, **options}).encode()
            stored[key.removesuffix("weight") + "comfy_quant"] = torch.tensor(list(conf), dtype=torch.uint8)
        else:
            stored[key] = weight
    return _filled(comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32, disabled=EMULATED), stored)


def quantise(weight: torch.Tensor, form: str) -> QuantizedTensor:
    options = {"convrot_groupsize": GROUP} if form in ROTATED else {"scale": "recalculate"}
    return QuantizedTensor.from_float(weight, QUANT_ALGOS[form]["comfy_tensor_layout"], **options)


def _filled(operations, stored: dict):
    model = small_model(0, WIDTH, operations=operations)
    with torch.inference_mode():
        missing, unexpected = model.model.load_state_dict(stored, strict=False, assign=operations is not PackedOps)
    assert not missing and not unexpected
    return model


def unpacked(model) -> dict[str, torch.Tensor]:
    """Every parameter as fp32 numbers, without patches."""
    return {key: unpatched(model, key).float() for key, _ in model.model.named_parameters()}


class PackedTensor(torch.Tensor):
    """Packed bytes that go by the shape of what they stand for, as the GGUF pack's do: int8 and a scale a row."""

    def __new__(cls, data, **_):
        return super().__new__(cls, data)

    def __init__(self, data, tensor_type=8, tensor_shape=(), patches=()):
        self.tensor_type, self.tensor_shape, self.patches = tensor_type, torch.Size(tensor_shape), list(patches)

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        rows = torch.cat([(weight / scale).round().to(torch.int8).view(torch.uint8), scale.view(torch.uint8)], 1)
        return cls(rows, tensor_shape=weight.shape)

    @property
    def shape(self):
        return self.tensor_shape if getattr(self, "tensor_shape", ()) else self.size()

    def to(self, *args, **kwargs):
        new = super().to(*args, **kwargs)
        new.tensor_type, new.tensor_shape, new.patches = self.tensor_type, self.tensor_shape, list(self.patches)
        return new

    def clone(self, *args, **kwargs):
        return self

    def detach(self, *args, **kwargs):
        return self


class PackedOps(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        """The seam of the GGUF pack's linear module: `get_weight` unpacks, with the patches that the tensor carries."""

        def _load_from_state_dict(self, state_dict, prefix, *args):
            for name in ("weight", "bias"):
                if prefix + name in state_dict:
                    setattr(self, name, torch.nn.Parameter(state_dict[prefix + name], requires_grad=False))

        def get_weight(self, tensor, dtype):
            if not isinstance(tensor, PackedTensor):
                return tensor.to(dtype)
            packed = tensor.as_subclass(torch.Tensor)
            numbers, scale = packed[:, :-4].view(torch.int8), packed[:, -4:].contiguous().view(torch.float32)
            return (numbers * scale).to(dtype)

        def cast_bias_weight(self, x):
            return self.get_weight(self.weight, x.dtype), None if self.bias is None else self.bias.to(x.dtype)

        def forward_comfy_cast_weights(self, x):
            return torch.nn.functional.linear(x, *self.cast_bias_weight(x))
