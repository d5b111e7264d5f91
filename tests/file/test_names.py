"""Names of ComfyUI and diffusers, one to one and back, and the order in which diffusers registers modules."""

import pytest
from small_sd import adapter, base_weights, modules

from soda.convert import renamed, to_comfy, to_diffusers
from soda.convert.names import architecture, diffusers_order, kohya
from soda.errors import SodaFileError
from soda.file import load, save

LAYERS = [(f"diffusion_model.{ldm}", f"unet.{diffusers}") for ldm, diffusers, _ in modules()]


def test_every_name_of_sd1_both_ways():
    for comfy, diffusers in LAYERS:
        assert to_diffusers(comfy) == diffusers
        assert to_comfy(diffusers) == to_comfy(diffusers.removeprefix("unet.")) == comfy


def test_text_encoders_both_ways():
    for comfy, diffusers in (("clip_l.transformer.", "text_encoder."), ("clip_g.transformer.", "text_encoder_2.")):
        path = "text_model.encoder.layers.3.self_attn.q_proj"
        assert to_diffusers(comfy + path) == diffusers + path and to_comfy(diffusers + path) == comfy + path


@pytest.mark.parametrize(
    "name",
    ["", "x", "diffusion_model.joint_blocks.0.x_block.attn.qkv", "diffusion_model.input_blocks.0.1.to_q",
     "diffusion_model.input_blocks.3.1.to_q", "diffusion_model.input_blocks.04.1.to_q",
     "diffusion_model.input_blocks.4.0.to_q", "diffusion_model.input_blocks.4.1.", "clip_h.transformer.x",
     "diffusion_model.input_blocks.4.1.to_q[0:8]", "clip_l.transformer.x[0:8]",
     "diffusion_model.input_blocks.99999999999999999999.1.to_q"],
)  # fmt: skip
def test_what_diffusers_has_no_name_for(name):
    with pytest.raises(SodaFileError, match="no name in diffusers;"):
        to_diffusers(name)


@pytest.mark.parametrize(
    "name",
    ["", "unet.", "down_blocks.0.attentions.2.to_q", "up_blocks.0.attentions.3.to_q", "down_blocks.0.resnets.0.conv1",
     "mid_block.attentions.1.to_q", "down_blocks.00.attentions.0.to_q", "vae.x", "text_encoder.x[0:8]"],
)  # fmt: skip
def test_what_comfyui_has_no_name_for(name):
    with pytest.raises(SodaFileError, match="no name in ComfyUI;"):
        to_comfy(name)


def test_an_adapter_survives_the_way_there_and_back(tmp_path):
    one = adapter(base_weights())
    save(renamed(one, to_diffusers), tmp_path / "there.safetensors")
    there = load(tmp_path / "there.safetensors")
    assert set(there.layers) == {diffusers for _, diffusers in LAYERS}
    save(renamed(there, to_comfy), tmp_path / "back.safetensors")
    save(one, tmp_path / "one.safetensors")
    back = load(tmp_path / "back.safetensors")
    assert back.content_hash == one.content_hash
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def test_the_order_of_diffusers():
    names = [comfy for comfy, _ in LAYERS]
    assert diffusers_order(sorted(names)) == names
    ten = [f"diffusion_model.middle_block.1.transformer_blocks.{t}.attn{a}.to_{p}"
           for t in range(11) for a in (1, 2) for p in ("q", "k", "v", "out.0")]  # fmt: skip
    assert diffusers_order(reversed(ten)) == ten


def test_lora_names():
    names = [comfy for comfy, _ in LAYERS]
    assert architecture(names) == "stable-diffusion-v1" and architecture(names[8:]) is None
    first = names[0]
    assert kohya(first, "stable-diffusion-v1") == "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert kohya(first, None) == "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    assert kohya("clip_l.transformer.a.b", "stable-diffusion-v1") == "lora_te_a_b"
    assert kohya("clip_g.transformer.a.b", "stable-diffusion-xl-v1-base") == "lora_te2_a_b"
