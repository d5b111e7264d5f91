"""Converted files against ComfyUI itself: its names of modules, and its own LoRA loader."""

from __future__ import annotations

import comfy.lora
import comfy.model_detection
import comfy.utils
import pytest
import torch
from safetensors.torch import save_file
from small_models import adapter, load, small_model, weights
from soda_pack.soda.convert import BaseWeights, save_difference, save_lora, to_comfy, to_diffusers
from soda_pack.soda.convert.names import architecture, diffusers_order, kohya
from soda_pack.soda.hosts.comfy.patch import apply
from soda_pack.soda.hosts.comfy.targets import attention_weights

SD1 = {"num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
       "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1}  # fmt: skip
SDXL = {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "count", "family"), [(SD1, 128, "stable-diffusion-v1"), (SDXL, 560, "stable-diffusion-xl-v1-base")]
)
def test_the_names_are_comfyuis_own(config, count, family):
    ours = 0
    names = []
    for diffusers, comfy_key in comfy.utils.unet_to_diffusers(config).items():
        if ".transformer_blocks." not in diffusers or not diffusers.endswith(".weight"):
            continue
        there, back = (key.removesuffix(".weight") for key in (diffusers, comfy_key))
        assert to_comfy(there) == to_comfy(f"unet.{there}") == f"diffusion_model.{back}"
        assert to_diffusers(f"diffusion_model.{back}") == f"unet.{there}"
        if ".attn" in there:
            ours += 1
            names.append(f"diffusion_model.{back}")
    assert ours == count == len(diffusers_order(names)) and architecture(names) == family


@pytest.mark.parametrize(("config", "family"), [(SD1, "stable-diffusion-v1"), (SDXL, None)])
def test_lora_names_are_ones_that_comfyui_knows(config, family):
    """The key map of ComfyUI, for a model that has these modules."""

    class Model:
        class model_config:  # noqa: N801
            unet_config = config

        def state_dict(self):
            return {f"diffusion_model.{key}": None for key in comfy.utils.unet_to_diffusers(config).values()}

    known = comfy.lora.model_lora_keys_unet(Model(), {})
    for key in Model().state_dict():
        if ".attn" in key and key.endswith(".weight"):
            assert known[kohya(key.removesuffix(".weight"), family)] == key


@pytest.mark.parametrize("decomposition", ["lq", "svd", "none"])
def test_comfyuis_lora_loader_reads_what_is_written(tmp_path, decomposition):
    """The difference, and a LoRA of full rank, change the model as the adapter itself does."""
    model = small_model()
    one = adapter(model, decomposition=decomposition)
    base = weights(model)
    save_file({f"model.{key}": weight.contiguous() for key, weight in base.items()}, tmp_path / "base.safetensors")
    file = BaseWeights(tmp_path / "base.safetensors")
    save_difference(one, file, tmp_path / "diff.safetensors", torch.float32)
    told = save_lora(one, file, tmp_path / "lora.safetensors", 64, torch.float32)
    assert told["energy_kept"] == pytest.approx(1.0)
    patched, _, _ = apply(model, [(one, 1.0)])
    load(patched)
    expected = weights(patched)
    for name in ("diff", "lora"):
        loaded = comfy.utils.load_torch_file(str(tmp_path / f"{name}.safetensors"), safe_load=True)
        patches = comfy.lora.load_lora(loaded, comfy.lora.model_lora_keys_unet(model.model, {}))
        assert set(patches) == set(attention_weights(model).values())
        clone = model.clone()
        assert len(clone.add_patches(patches, 1.0)) == len(patches)
        load(clone)
        found = weights(clone)
        for key in attention_weights(model).values():
            assert not torch.equal(found[key], base[key])
            assert (found[key] - expected[key]).abs().max() < 2e-5, key
