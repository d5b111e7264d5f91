"""Small random models made of ComfyUI's own classes, and adapters for them."""

from __future__ import annotations

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.pixart_t5
import torch
from comfy.weight_adapter import LoRAAdapter
from soda_pack.soda.adapter import Adapter, Layer
from soda_pack.soda.hosts.comfy.base import shapes
from soda_pack.soda.hosts.comfy.targets import attention_weights
from soda_pack.soda.kronecker import factor_sizes

CONTEXT = 48


def small_model(
    seed: int = 0, width: int = 32, v_prediction: bool = False, dtype=torch.float32, channels: int = 4, operations=None
):  # fmt: skip
    """A ModelPatcher around an SD1-like UNet with two levels; its weights are inference tensors, as from loaders."""
    config = comfy.supported_models.SD15(
        {
            "image_size": 32, "in_channels": channels, "out_channels": channels, "model_channels": width,
            "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
            "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": CONTEXT,
            "use_linear_in_transformer": False,
            "use_spatial_transformer": True, "legacy": False, "use_temporal_attention": False, "adm_in_channels": None,
            "dtype": dtype,
        }
    )  # fmt: skip
    kind = comfy.model_base.ModelType.V_PREDICTION if v_prediction else comfy.model_base.ModelType.EPS
    cpu = torch.device("cpu")
    with torch.inference_mode():
        config.manual_cast_dtype = None if dtype == torch.float32 else torch.float32
        config.custom_operations = operations
        if channels == 3:
            config.latent_format = comfy.latent_formats.ChromaRadiance()
        model = comfy.model_base.BaseModel(config, model_type=kind, device=cpu)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            fan_in = parameter.shape[1:].numel() if parameter.ndim > 1 else 1
            numbers = torch.randn(parameter.shape, generator=generator) * (fan_in**-0.5 if parameter.ndim > 1 else 0.1)
            parameter.data.copy_(numbers + (1.0 if name.endswith("norm.weight") else 0.0))
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def adapter(model, seed: int = 1, size: float = 0.3, decomposition: str = "lq", factors: int = 3, name: str = "test"):
    """A random adapter for every attention projection of `model`."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    known = shapes(model)
    for layer, key in attention_weights(model).items():
        shape = known[key]
        sizes = factor_sizes(shape[0] if decomposition == "qr" else shape[1], factors)
        logs = tuple(torch.randn(n * (n - 1) // 2, generator=generator) * size for n in sizes)
        delta = None if decomposition == "none" else torch.randn(min(shape), generator=generator) * size * 0.1
        layers[layer] = (Layer(decomposition, delta, logs),)
    return Adapter(layers, {"soda.role": "style"}, name)


def lora(model, seed: int = 2) -> dict:
    """Core LoRA patches of rank 2 for the attention projections."""
    generator = torch.Generator().manual_seed(seed)
    known = shapes(model)
    patches = {}
    for key in attention_weights(model).values():
        rows, columns = known[key]
        up, down = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator) * 0.02
        patches[key] = LoRAAdapter(set(), (up, down, 2.0, None, None, None))
    return patches


def load(model):
    """Put a ModelPatcher's patches into its model, as ComfyUI does before sampling."""
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model], force_full_load=True)


def weights(model) -> dict[str, torch.Tensor]:
    """A copy of every tensor that the model computes with."""
    return {key: tensor.detach().clone() for key, tensor in model.model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def conditioning(seed: int = 3, tokens: int = 7) -> list:
    """A CONDITIONING with one caption."""
    with torch.inference_mode():
        tensor = torch.randn(1, tokens, CONTEXT, generator=torch.Generator().manual_seed(seed))
    return [[tensor, {"pooled_output": None}]]


def small_clip():
    """A CLIP of CONTEXT channels with two layers and its usual tokenizer."""
    config = {
        "hidden_size": CONTEXT, "projection_dim": CONTEXT, "intermediate_size": CONTEXT, "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }  # fmt: skip
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    return _text_encoder(target, {"clip_l_model_config": config}, seed=6)


def small_t5():
    """A T5 of CONTEXT channels with two layers and its usual tokenizer, as PixArt has it."""
    config = {"d_model": CONTEXT, "d_ff": 2 * CONTEXT, "d_kv": CONTEXT // 4, "num_heads": 4, "num_layers": 2}
    target = comfy.supported_models_base.ClipTarget(
        comfy.text_encoders.pixart_t5.PixArtTokenizer, comfy.text_encoders.pixart_t5.pixart_te()
    )
    return _text_encoder(target, {"t5xxl_model_config": config}, seed=8)


def _text_encoder(target, options: dict, seed: int):
    """ComfyUI's CLIP of this target, with random weights."""
    with torch.inference_mode():
        clip = comfy.sd.CLIP(target, model_options=options)
        generator = torch.Generator().manual_seed(seed)
        for parameter in clip.cond_stage_model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return clip


def pixel_vae():
    """ComfyUI's VAE whose latents are the pixels, in -1 to 1."""
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})


def latents(count: int = 1, size: int = 8, seed: int = 4, channels: int = 4) -> dict:
    """A LATENT with `count` samples of size x size."""
    with torch.inference_mode():
        return {"samples": torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))}
