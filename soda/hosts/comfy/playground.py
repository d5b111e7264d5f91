"""A small text-to-image checkpoint on ComfyUI's own classes: UNet, flow sampling, CLIP and pixel-space VAE.

The file has Stable Diffusion 1's tensor names and, in its metadata, the configurations that a detection by shapes
would not find. Of the token embedding it holds only the rows of `token_ids`; all other words embed as zero.
"""

from __future__ import annotations

import json

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch

EMBEDDING = "transformer.text_model.embeddings.token_embedding.weight"


class PlaygroundModel(comfy.supported_models_base.BASE):
    """The model configuration: flow matching on RGB pixels, fp32 everywhere since it is small."""

    unet_extra_config: dict = {}
    latent_format = comfy.latent_formats.ChromaRadiance
    sampling_settings = {"shift": 1.0}
    memory_usage_factor = 0.5
    supported_inference_dtypes = [torch.float32]

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.FLOW


def _read(path: str) -> tuple[dict[str, torch.Tensor], dict]:
    tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    return tensors, json.loads(metadata["soda.playground"])


def load_model(path: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The MODEL of the checkpoint. Registered as its own `cached_patcher_init`, by which ComfyUI loads a fresh copy."""
    tensors, configuration = _read(path)
    config = PlaygroundModel(configuration["unet"])
    config.set_inference_dtype(torch.float32, None)
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    model = config.get_model(tensors, "model.diffusion_model.", device=offload)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=device, offload_device=offload)
    weights = {key: value.float() for key, value in tensors.items() if key.startswith("model.diffusion_model.")}
    model.load_model_weights(weights, "model.diffusion_model.", assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_model, (path,))
    return patcher


def load_clip(path: str, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """The CLIP of the checkpoint: ComfyUI's SD1 tokenizer and text model at the checkpoint's width."""
    tensors, configuration = _read(path)
    prefix = "cond_stage_model."
    weights = {f"clip_l.{k[len(prefix) :]}": v.float() for k, v in tensors.items() if k.startswith(prefix)}
    rows = weights[f"clip_l.{EMBEDDING}"]
    table = torch.zeros(configuration["text"]["vocab_size"], rows.shape[1])
    table[tensors["token_ids"].long()] = rows
    weights[f"clip_l.{EMBEDDING}"] = table
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    clip = comfy.sd.CLIP(
        target,
        parameters=sum(w.numel() for w in weights.values()),
        state_dict=weights,
        model_options={"clip_l_model_config": configuration["text"], "dtype": torch.float32},
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (_load_clip_patcher, (path,))
    return clip


def _load_clip_patcher(path: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_clip(path, disable_dynamic).patcher


def load_vae() -> comfy.sd.VAE:
    """ComfyUI's pixel-space VAE: pictures and latents differ in range and axes only."""
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
