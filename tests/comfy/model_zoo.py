"""Every class of ComfyUI's own list of models, at small depth and width, from ComfyUI's own code.

The list of 0.33 has three more than that of 0.30.
"""

from __future__ import annotations

import comfy.ldm.audio.embedders
import comfy.model_patcher
import comfy.nested_tensor
import comfy.supported_models
import torch

CPU = torch.device("cpu")
# What checkpoints say about a model, shrunk; keys are those of ComfyUI's model detection.
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1],
    "channel_mult": [1, 1], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1, "context_dim": 48, "use_spatial_transformer": True, "legacy": False,
}  # fmt: skip
LABEL = {"num_classes": "sequential"}
VIDEO = {
    **UNET, **LABEL, "in_channels": 8, "extra_ff_mix_layer": True, "use_spatial_context": True,
    "merge_strategy": "learned_with_images", "merge_factor": 0.0, "video_kernel_size": [3, 1, 1],
}  # fmt: skip
FLUX = {
    "in_channels": 16, "out_channels": 16, "hidden_size": 48, "num_heads": 2, "axes_dim": [8, 8, 8], "mlp_ratio": 4.0,
    "theta": 10000, "depth": 1, "depth_single_blocks": 1, "patch_size": 2, "context_in_dim": 64, "vec_in_dim": 32,
    "qkv_bias": True, "txt_ids_dims": [],
}  # fmt: skip
FLUX2 = {
    **FLUX, "image_model": "flux2", "in_channels": 128, "out_channels": 128, "hidden_size": 64,
    "axes_dim": [8, 8, 8, 8], "mlp_ratio": 3.0, "theta": 2000, "patch_size": 1, "vec_in_dim": None, "qkv_bias": False,
    "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "guidance_embed": True,
}  # fmt: skip
CHROMA = {
    **FLUX, "in_channels": 64, "out_channels": 64, "vec_in_dim": None, "in_dim": 64, "out_dim": 48, "hidden_dim": 80,
    "n_layers": 2,
}  # fmt: skip
RADIANCE = {
    **CHROMA, "in_channels": 3, "out_channels": 3, "patch_size": 4, "nerf_hidden_size": 16, "nerf_mlp_ratio": 2,
    "nerf_depth": 1, "nerf_max_freqs": 4, "nerf_tile_size": 512, "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32, "use_x0": False, "use_sequential_txt_ids": False,
}  # fmt: skip
HUNYUAN_VIDEO = {
    "image_model": "hunyuan_video", "in_channels": 16, "patch_size": [1, 2, 2], "out_channels": 16, "vec_in_dim": 32,
    "axes_dim": [8, 8, 8], "meanflow": False, "context_in_dim": 64, "hidden_size": 48, "mlp_ratio": 4.0,
    "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "theta": 256, "qkv_bias": True, "byt5": False,
    "guidance_embed": True, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
HUNYUAN_IMAGE = {
    **HUNYUAN_VIDEO, "vec_in_dim": None, "patch_size": [1, 1], "axes_dim": [12, 12], "in_channels": 64,
    "out_channels": 64,
}  # fmt: skip
HUNYUAN_1_5 = {
    **HUNYUAN_VIDEO, "vec_in_dim": None, "vision_in_dim": 1152, "use_cond_type_embedding": True, "meanflow_sum": True,
    "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "guidance_embed": False,
}  # fmt: skip
COSMOS = {
    "max_img_h": 32, "max_img_w": 32, "max_frames": 8, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 64, "concat_padding_mask": True, "pos_emb_cls": "rope3d",
    "pos_emb_learnable": False, "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 16,
    "num_blocks": 1, "num_heads": 2, "extra_per_block_abs_pos_emb": False, "crossattn_emb_channels": 64,
}  # fmt: skip
COSMOS_1 = {
    **COSMOS, "block_config": "FA-CA-MLP", "block_x_format": "THWBD", "affline_emb_norm": True,
    "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
}  # fmt: skip
COSMOS_2 = {**COSMOS, "min_fps": 1, "max_fps": 30, "rope_enable_fps_modulation": False}
ANIMA = {**COSMOS_2, "crossattn_emb_channels": 1024}
LUMINA = {
    "patch_size": 2, "in_channels": 16, "dim": 48, "cap_feat_dim": 64, "n_layers": 1, "n_refiner_layers": 1,
    "qk_norm": True, "n_heads": 2, "n_kv_heads": 1, "axes_dims": [8, 8, 8], "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0, "multiple_of": 16,
}  # fmt: skip
Z_IMAGE = {
    **LUMINA, "dim": 256, "axes_dims": [32, 48, 48], "n_kv_heads": 2, "z_image_modulation": True, "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}  # fmt: skip
Z_PIXEL = {
    **Z_IMAGE, "in_channels": 3, "patch_size": 4, "decoder_hidden_size": 32, "decoder_num_res_blocks": 1,
    "decoder_max_freqs": 4, "decoder_in_channels": 48,
}  # fmt: skip
PIXELDIT = {
    "hidden_size": 48, "num_groups": 2, "pixel_hidden_size": 8, "pixel_attn_hidden_size": 48, "pixel_num_groups": 2,
    "patch_depth": 2, "pixel_depth": 1, "patch_size": 4, "txt_embed_dim": 64,
}  # fmt: skip
WAN = {
    "dim": 48, "out_dim": 16, "num_heads": 2, "ffn_dim": 64, "num_layers": 1, "patch_size": (1, 2, 2), "freq_dim": 32,
    "in_dim": 16, "text_dim": 64, "text_len": 16,
}  # fmt: skip
HUNYUAN_3D = {
    "in_channels": 64, "context_in_dim": 64, "hidden_size": 48, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1,
    "depth_single_blocks": 1, "qkv_bias": True, "guidance_embed": False,
}  # fmt: skip
AUDIO = {
    "global_cond_dim": 1536, "project_cond_tokens": False, "embed_dim": 768, "cond_token_dim": 768, "num_heads": 12,
    "timestep_features_type": "learned", "io_channels": 64, "input_concat_dim": 0, "depth": 1,
}  # fmt: skip
HYDIT = {"depth": 2, "hidden_size": 64, "num_heads": 2, "text_states_dim": 64, "text_states_dim_t5": 64}
PIXART = {"num_heads": 2, "patch_size": 2, "hidden_size": 48, "in_channels": 4, "depth": 1, "caption_channels": 64}
LTX = {"num_layers": 1, "attention_head_dim": 24, "num_attention_heads": 2, "cross_attention_dim": 48,
       "caption_channels": 64}  # fmt: skip
QWEN = {"num_layers": 1, "attention_head_dim": 24, "num_attention_heads": 2, "joint_attention_dim": 64,
        "axes_dims_rope": (8, 8, 8)}  # fmt: skip
OMNIGEN = {
    "hidden_size": 48, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1,
    "multiple_of": 16, "axes_dim_rope": (8, 8, 8), "axes_lens": (300, 512, 512),
}  # fmt: skip
KANDINSKY = {
    "model_dim": 96, "axes_dims": (8, 20, 20), "time_dim": 32, "ff_dim": 64, "num_text_blocks": 1,
    "num_visual_blocks": 1, "in_text_dim": 64, "in_text_dim2": 32,
}  # fmt: skip
COGVIDEO = {
    "num_attention_heads": 1, "attention_head_dim": 64, "time_embed_dim": 32, "num_layers": 1, "in_channels": 16,
    "patch_size": 2, "text_embed_dim": 64, "use_rotary_positional_embeddings": True,
}  # fmt: skip
SMALL = {
    "SD15": UNET, "SD20": UNET, "SD15_instructpix2pix": {**UNET, "in_channels": 8}, "SSD1B": {**UNET, **LABEL},
    "SDXL": {**UNET, **LABEL}, "SDXL_instructpix2pix": {**UNET, **LABEL, "in_channels": 8},
    "SDXLRefiner": {**UNET, **LABEL}, "Segmind_Vega": {**UNET, **LABEL}, "KOALA_700M": {**UNET, **LABEL},
    "KOALA_1B": {**UNET, **LABEL}, "SD21UnclipL": {**UNET, **LABEL}, "SD21UnclipH": {**UNET, **LABEL},
    "Stable_Zero123": {**UNET, "in_channels": 8}, "SD_X4Upscaler": {**UNET, "in_channels": 7, "num_res_blocks": [1] * 4,
                                                            "channel_mult": [1] * 4, "transformer_depth": [0, 1, 1, 1],
                                                            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 0, 0]},
    "LotusD": {**UNET, **LABEL}, "SVD_img2vid": VIDEO, "SV3D_u": VIDEO, "SV3D_p": VIDEO,
    "Stable_Cascade_C": {"c_cond": 64, "c_hidden": [64, 64], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]],
                         "c_clip_text": 64, "c_clip_text_pooled": 64, "c_clip_img": 768},
    "Stable_Cascade_B": {"c_cond": 64, "c_hidden": [32, 32, 64, 64], "nhead": [-1, -1, 2, 2], "c_clip": 64,
                         "blocks": [[1] * 4, [1] * 4], "block_repeat": [[1] * 4, [1] * 4]},
    "SD3": {"in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 1, "input_size": None,
            "adm_in_channels": 64, "num_patches": 64, "pos_embed_max_size": 8, "qk_norm": "rms",
            "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 64}},
            "x_block_self_attn_layers": [0]},
    "StableAudio": AUDIO,
    "StableAudio3": {**AUDIO, "global_cond_dim": 768, "io_channels": 256, "local_add_cond_dim": 257,
                     "global_cond_type": "adaLN", "norm_type": "rms_norm",
                     "attn_kwargs": {"qk_norm": "rms", "differential": True}},
    "AuraFlow": {"max_seq": 64, "cond_seq_dim": 64, "n_double_layers": 1, "n_layers": 2, "dim": 64, "n_heads": 2,
                 "global_conddim": 64},
    "PixArtAlpha": {**PIXART, "micro_condition": True}, "PixArtSigma": {**PIXART, "micro_condition": False},
    "HunyuanDiT": HYDIT, "HunyuanDiT1": {**HYDIT, "size_cond": True, "use_style_cond": True},
    "Flux": FLUX, "FluxInpaint": {**FLUX, "in_channels": 96}, "FluxSchnell": FLUX, "Flux2": FLUX2,
    "LongCatImage": {**FLUX, "vec_in_dim": None, "context_in_dim": 3584, "txt_ids_dims": [1, 2]},
    "Chroma": CHROMA, "ChromaRadiance": RADIANCE,
    "Lens": {"num_layers": 1, "attention_head_dim": 24, "num_attention_heads": 2, "enc_hidden_dim": 64,
             "axes_dims_rope": (8, 8, 8), "selected_layer_index": (0, 1)},
    "GenmoMochi": {"depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": 64, "hidden_size_y": 32,
                   "mlp_ratio_x": 192.0, "mlp_ratio_y": 4.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True,
                   "qkv_bias": False, "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True,
                   "posenc_preserve_area": True, "timestep_mlp_bias": True, "attend_to_padding": False,
                   "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 64, "t5_token_length": 16},
    "LTXV": LTX, "LTXAV": {**LTX, "connector_attention_head_dim": 16, "connector_num_attention_heads": 4,
                           "connector_num_layers": 1, "audio_cross_attention_dim": 32, "audio_attention_head_dim": 16,
                           "audio_num_attention_heads": 2},
    "MiniMaxH3": {"num_layers": 1, "token_refiner_num_layers": 1, "hidden_size": 48, "latents_dim": 16,
                  "audio_latents_dim": 8, "attention_head_dim": 24, "num_attention_heads": 2, "ffn_hidden_size": 64,
                  "text_dim": 64, "timestep_input_dim": 32, "time_embed_hidden_size": 48, "time_embed_dim": 24,
                  "rope_inv_freq_len": 4},
    "HunyuanVideo": HUNYUAN_VIDEO, "HunyuanVideoI2V": {**HUNYUAN_VIDEO, "in_channels": 33},
    "HunyuanVideoSkyreelsI2V": {**HUNYUAN_VIDEO, "in_channels": 32}, "HunyuanImage21": HUNYUAN_IMAGE,
    "HunyuanImage21Refiner": {**HUNYUAN_VIDEO, "vec_in_dim": None, "patch_size": [1, 1, 1], "in_channels": 128,
                                                     "out_channels": 64},
    "HunyuanVideo15": HUNYUAN_1_5, "HunyuanVideo15_SR_Distilled": {**HUNYUAN_1_5, "in_channels": 98},
    "CosmosT2V": COSMOS_1, "CosmosI2V": {**COSMOS_1, "in_channels": 17}, "CosmosT2IPredict2": COSMOS_2,
    "CosmosI2VPredict2": {**COSMOS_2, "in_channels": 17}, "Anima": ANIMA,
    "Lumina2": LUMINA, "ZImage": Z_IMAGE, "ZImagePixelSpace": Z_PIXEL, "PixelDiTT2I": PIXELDIT, "PiD": PIXELDIT,
    "WAN21_T2V": WAN, "WAN21_CausalAR_T2V": WAN, "WAN21_I2V": {**WAN, "in_dim": 36},
    "WAN21_FunControl2V": {**WAN, "in_dim": 48}, "WAN21_Camera": {**WAN, "in_dim": 32},
    "WAN22_Camera": {**WAN, "in_dim": 36}, "WAN21_Vace": {**WAN, "vace_layers": 1, "vace_in_dim": 96},
    "WAN21_HuMo": WAN, "WAN22_S2V": {**WAN, "audio_inject_layers": [0]}, "WAN22_Animate": {**WAN, "num_layers": 5},
    "WAN_Animate2": {**WAN, "in_dim": 36},
    "WAN22_T2V": {**WAN, "in_dim": 48, "out_dim": 48}, "WAN21_FlowRVS": WAN, "WAN21_SCAIL": {**WAN, "in_dim": 20},
    "WAN21_SCAIL2": {**WAN, "in_dim": 20}, "WAN22_WanDancer": {**WAN, "in_dim": 36, "audio_inject_layers": [0]},
    "Hunyuan3Dv2": HUNYUAN_3D, "Hunyuan3Dv2mini": HUNYUAN_3D,
    "Hunyuan3Dv2_1": {"in_channels": 64, "context_dim": 64, "hidden_size": 64, "num_heads": 2, "depth": 3,
                      "qkv_bias": False, "guidance_cond_proj_dim": None, "num_moe_layers": 1, "num_experts": 2},
    "TripoSplat": {"model_channels": 64, "cond_channels": 64, "num_blocks": 1, "num_refiner_blocks": 1,
                   "num_head_channels": 32, "q_token_length": 16},
    "Trellis2": {"resolution": 32, "model_channels": 64, "cond_channels": 48, "num_blocks": 1, "num_heads": 2,
                 "init_txt_model": True},
    "HiDream": {"attention_head_dim": 24, "axes_dims_rope": [8, 8, 8], "caption_channels": [64, 64],
                "max_resolution": [32, 32], "in_channels": 16, "llama_layers": [0, 1], "num_attention_heads": 2,
                "num_routed_experts": 2, "num_activated_experts": 1, "num_layers": 1, "num_single_layers": 1,
                "out_channels": 16, "patch_size": 2, "text_emb_dim": 64},
    "HiDreamO1": {
        "text_config_overrides": {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
                                  "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
                                  "rope_dims": [8, 4, 4]},
        "vision_config_overrides": {"hidden_size": 64, "intermediate_size": 64, "depth": 1, "num_heads": 2}},
    "SeedVR2": {"vid_dim": 64, "heads": 1, "head_dim": 64, "num_layers": 2, "mm_layers": 1, "norm_eps": 1e-5,
                "mlp_type": "swiglu", "txt_in_dim": 64, "rope_dim": 64, "vid_out_norm": True},
    "ACEStep": {"attention_head_dim": 24, "in_channels": 8, "inner_dim": 48, "num_attention_heads": 2, "num_layers": 1,
                "patch_size": [16, 1], "ssl_latent_dims": [32, 16], "ssl_encoder_depths": [1, 1],
                "speaker_embedding_dim": 512, "text_embedding_dim": 32, "lyric_hidden_size": 1024},
    "ACEStep15": {"hidden_size": 64, "text_hidden_dim": 64, "num_dit_layers": 1, "num_lyric_layers": 1,
                  "num_timbre_layers": 1, "num_tokenizer_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32,
                  "intermediate_size": 64, "fsq_dim": 64, "encoder_hidden_size": 64, "encoder_intermediate_size": 64,
                  "encoder_num_heads": 2},
    "Omnigen2": {**OMNIGEN, "text_feat_dim": 64},
    "Boogu": {**OMNIGEN, "num_double_stream_layers": 1, "instruction_feat_dim": 64, "num_layers": 2},
    "MageFlow": {**QWEN, "in_channels": 128, "out_channels": 128}, "QwenImage": QWEN,
    "JoyImage": {"in_channels": 16, "hidden_size": 48, "num_attention_heads": 2, "text_dim": 64, "num_layers": 1,
                 "rope_dim_list": [8, 8, 8]},
    "Ideogram4": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 24, "intermediate_size": 64,
                  "adaln_dim": 32, "llm_features_dim": 64, "mrope_section": (4, 4, 4)},
    "Krea2": {"features": 64, "tdim": 32, "txtdim": 64, "heads": 2, "kvheads": 1, "layers": 1, "txtlayers": 2,
              "txtheads": 2, "txtkvheads": 2},
    "Kandinsky5": {**KANDINSKY, "visual_embed_dim": 132}, "Kandinsky5Image": {**KANDINSKY, "visual_embed_dim": 64},
    "ErnieImage": {"hidden_size": 48, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 64,
                   "text_in_dim": 64, "rope_axes_dim": (8, 8, 8)},
    "CogVideoX_T2V": COGVIDEO, "CogVideoX_I2V": {**COGVIDEO, "in_channels": 32},
    "CogVideoX_Inpaint": {**COGVIDEO, "in_channels": 48},
    "RT_DETR_v4": {}, "SAM3": {}, "SAM31": {}, "DepthAnything3": {"backbone_name": "vits"},
    "MiniMaxMusic3": {},
}  # fmt: skip

# Widths of text encodings that are not the model's own context_dim, context_in_dim, text_dim or cross_attention_dim.
TEXT = {"LTXAV": 64, 
    "Stable_Zero123": 52, "StableAudio": 768, "StableAudio3": 768, "Krea2": 128, "Lens": 128, "Anima": 1024, "LTXV": 64,
    "ACEStep": 32, "HunyuanDiT": 64, "HunyuanDiT1": 64,
}  # fmt: skip
POOLED = {"LotusD": 4, "Kandinsky5": 32, "Kandinsky5Image": 32}  # not 1280, adm_in_channels or vec_in_dim


def extras(name: str) -> dict[str, torch.Tensor]:
    """What a model takes from its checkpoint besides its own weights."""
    if name == "Stable_Zero123":
        return {"cc_projection.weight": torch.zeros(48, 52), "cc_projection.bias": torch.zeros(48)}
    if name.startswith("StableAudio"):
        seconds = comfy.ldm.audio.embedders.NumberConditioner(768).state_dict()
        kinds = ("seconds_start", "seconds_total") if name == "StableAudio" else ("seconds_total",)
        return {f"conditioner.conditioners.{kind}.{key}": value for kind in kinds for key, value in seconds.items()}
    return {}


def config(name: str):
    """The model configuration of a class of ComfyUI's list, shrunk; other values stay as the class has them."""
    kind = getattr(comfy.supported_models, name)
    shrunk = {**kind.unet_config, **SMALL[name]}
    made = kind(shrunk)
    made.unet_config.update({key: value for key, value in SMALL[name].items() if key in kind.unet_extra_config})
    made.set_inference_dtype(torch.float32, None)
    return made


# Buffers that are uninitialised memory until a checkpoint fills them.
BARE = ("pos_embed", "_conditioning", "inv_freq", "adaln_t_table")


def build(name: str, device: torch.device = CPU, seed: int = 0) -> comfy.model_patcher.ModelPatcher:
    """A ModelPatcher around the small model with random weights (none on the meta device), made under inference mode
    as ComfyUI's loaders make it."""
    with torch.inference_mode():
        model = config(name).get_model(extras(name), "", device=device)
        model.eval()
        if device.type != "meta":
            generator = torch.Generator().manual_seed(seed)
            for key, parameter in model.named_parameters():
                fan_in = parameter.shape[1:].numel() if parameter.ndim > 1 else 1
                numbers = torch.randn(parameter.shape, generator=generator)
                offset = 1.0 if parameter.ndim == 1 and "norm" in key and key.endswith(("weight", "scale")) else 0.0
                parameter.data.copy_(numbers * (fan_in**-0.5 if parameter.ndim > 1 else 0.1) + offset)
            for key, buffer in model.named_buffers():
                if key.endswith(BARE):
                    buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
        model.requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


PARTS = {  # of nested latents
    "LTXAV": [(128, 1, 8, 8), (8, 4, 16)], "MiniMaxH3": [(16, 1, 8, 8), (8, 2, 5)], "TripoSplat": [(16, 16), (1, 5)],
}  # fmt: skip


def latents(name: str, model: comfy.model_patcher.ModelPatcher, count: int = 2) -> dict:
    """A LATENT of `count` small samples."""
    space = model.model.latent_format
    side = {"PixArtAlpha": 64, "PixArtSigma": 64, "HiDreamO1": 64, "Stable_Cascade_B": 32}.get(name, 8)
    sizes = {1: (16,), 2: (16 if name == "ACEStep" else side, side), 3: (1, side, side)}[space.latent_dimensions]
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(1)
        # the refiner's pictures have half its channels: two frames become one
        channels = space.latent_channels // 2 if name == "HunyuanImage21Refiner" else space.latent_channels
        shapes = PARTS.get(name) or [(channels, *sizes)]
        parts = [torch.randn(count, *shape, generator=generator) for shape in shapes]
        return {"samples": parts[0] if len(parts) == 1 else comfy.nested_tensor.NestedTensor(parts)}


def conditioning(name: str) -> list:
    """A CONDITIONING of one caption with all that the model's own text encoding nodes give it."""
    kind = getattr(comfy.supported_models, name)
    said = {**kind.unet_config, **SMALL[name]}
    width = TEXT.get(name) or next(
        (said[key] for key in ("context_dim", "context_in_dim", "text_dim", "cross_attention_dim") if said.get(key)), 64
    )
    sdxl = issubclass(kind, (comfy.supported_models.SDXL, comfy.supported_models.SDXLRefiner))
    pooled = POOLED.get(name) or (1280 if sdxl else said.get("adm_in_channels") or said.get("vec_in_dim") or 64)
    tokens = 77 if name.startswith("HunyuanDiT") else 7
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(2)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        more = {"pooled_output": noise(1, pooled)}
        if name.startswith("HunyuanDiT"):
            more |= {"conditioning_mt5xl": noise(1, 256, 64), "attention_mask_mt5xl": torch.ones(1, 256)}
        if name.startswith("HunyuanDiT") or name in ("GenmoMochi", "LTXV", "Omnigen2", "Boogu"):
            more["attention_mask"] = torch.ones(1, tokens, dtype=torch.int64)
        if name == "HiDreamO1":
            more["text_input_ids"] = torch.ones(1, tokens, dtype=torch.int64)
        if name == "HiDream":
            more["conditioning_llama3"] = noise(1, 2, tokens, 64)
        if name == "ACEStep":
            more["conditioning_lyrics"] = torch.ones(1, 5, dtype=torch.int64)
        if name == "ACEStep15":
            more["conditioning_lyrics"] = noise(1, 5, 64)
        if name == "Stable_Cascade_B":
            more["stable_cascade_prior"] = noise(1, 16, 4, 4)
        if name == "PiD":
            more |= {"lq_latent": noise(1, 16, 2, 2), "degrade_sigma": torch.zeros(1)}
        if name == "SeedVR2":
            more["condition"] = noise(1, 17, 1, 8, 8)
        return [[noise(1, tokens, width), more]]
