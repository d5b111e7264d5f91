"""The playground model in numbers: the configurations of ComfyUI's own UNet and CLIP text classes that it uses.

Flow matching in pixel space: `x_t = (1 - t) x_0 + t noise`, the UNet gets `1000 t` and predicts `noise - x_0`.
Pictures are 64x64; attention is at 16x16 only, where it holds a quarter of all parameters.
"""

CHANNELS = 32
UNET = {
    "image_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": CHANNELS,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 3, 4],
    "transformer_depth": [0, 0, 4],
    "transformer_depth_output": [0, 0, 0, 0, 4, 4],
    "transformer_depth_middle": 3,
    "context_dim": 192,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
}
TEXT = {
    "num_hidden_layers": 2,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_attention_heads": 6,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "projection_dim": 192,
    "eos_token_id": 49407,
    "vocab_size": 49408,
}
