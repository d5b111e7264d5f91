"""SODA Train on models as other nodes hand them over, and on pictures of several sizes."""

import math

import pytest
import safetensors.torch
import torch
from PIL import Image
from prompts import Playground, Prompt
from random_prompts import attention

# The kinds of sampling object that ComfyUI's nodes put on a model: noise, v, x0, flow, and sigmas without steps.
SAMPLING = [
    *(("ModelSamplingDiscrete", {"sampling": kind, "zsnr": zsnr})
      for kind, zsnr in (("eps", False), ("v_prediction", True), ("x0", False), ("img_to_img_flow", False))),
    ("ModelSamplingContinuousEDM", {"sampling": "edm", "sigma_max": 120.0, "sigma_min": 0.002}),
    ("ModelSamplingAuraFlow", {"shift": 1.73}),
]  # fmt: skip
DOWNSCALE = {
    "block_number": 1, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 1.0,
    "downscale_after_skip": True, "downscale_method": "bicubic", "upscale_method": "bicubic",
}  # fmt: skip
PATCHED = [
    ("FreeU_V2", {"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2}),
    ("UNetCrossAttentionMultiply", {"q": 1.5, "k": 1.0, "v": 1.0, "out": 1.2}),
    ("PatchModelAddDownscale", DOWNSCALE),
]


def trained(client, adapters, prefix, node_between=None, **settings):
    """(the tensors that a training gave, the losses it told)."""
    prompt = Prompt()
    playground = Playground(prompt)
    if node_between is not None:
        class_type, values = node_between
        playground.model = (prompt.add(class_type, model=playground.model, **values), 0)
    latents, positive = playground.drawings()
    if "options" in settings:
        settings["options"] = playground.options(**settings["options"])
    node = playground.train(
        positive, latents=latents, **{"targets": "cross-attention", "reuse": False, "steps": 2, **settings}
    )
    playground.save((node, 0), prefix)
    client.run(prompt)
    (told,) = [t for t in client.get_json("/soda/training")["trainings"] if t["node"] == node][-1:]
    losses = [loss for _, loss, _ in told["points"]]
    return safetensors.torch.load_file(max(adapters.glob(f"{prefix}_0*"))), losses


@pytest.fixture(scope="module")
def plain(client, adapters):
    return trained(client, adapters, "plain_model")


@pytest.mark.parametrize(("class_type", "values"), SAMPLING, ids=[f"{c} {list(v.values())}" for c, v in SAMPLING])
def test_any_sampling_object_trains(client, adapters, base_unchanged, plain, class_type, values):
    tensors, losses = trained(client, adapters, "sampling", (class_type, values))
    assert len(losses) == 2 and losses != plain[1]  # its own objective
    assert any(tensor.any() for tensor in tensors.values())


def test_dco_compares_with_the_model_without_the_adapter(client, adapters, base_unchanged):
    """The two are one at first, and the sigmoid of no difference is a half; nothing else makes the loss that."""
    _, losses = trained(client, adapters, "dco", options={"loss": "dco", "loss.beta": 1000.0}, learning_rate=1e-3)
    assert losses[0] == pytest.approx(math.log(2), rel=1e-4) and losses[1] != losses[0]


@pytest.mark.parametrize(("dtype", "near"), [("bf16", 3e-2), ("fp16", 3e-3)])
def test_in_half_precision_factors_stay_fp32_and_losses_are_near(client, adapters, base_unchanged, plain, dtype, near):
    tensors, losses = trained(client, adapters, dtype, ("ModelComputeDtype", {"dtype": dtype}))
    assert losses != plain[1] and losses == pytest.approx(plain[1], rel=near)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values())
    learnt, exact = (torch.cat([t for name, t in sorted(found.items()) if "soda_log" in name])
                     for found in (tensors, plain[0]))  # fmt: skip
    assert torch.cosine_similarity(learnt, exact, dim=0) > 0.9


@pytest.mark.parametrize("memory", ["fast", "frugal"])
@pytest.mark.parametrize(("class_type", "values"), PATCHED, ids=[c for c, _ in PATCHED])
def test_patches_of_other_nodes_stay_in_effect(client, adapters, base_unchanged, plain, class_type, values, memory):
    """Some change activations in place."""
    _, losses = trained(client, adapters, "patched", (class_type, values), options={"memory": memory})
    assert losses[0] != pytest.approx(plain[1][0], rel=1e-3)


def test_a_lora_on_the_model_stays_active_and_frozen(client, adapters, base_unchanged, plain):
    generator = torch.Generator().manual_seed(1)
    lora = {}
    for name, weight in attention("unet").items():
        lora[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 4, generator=generator) * 0.03
        lora[f"{name}.lora_down.weight"] = torch.randn(4, weight.shape[1], generator=generator) * 0.3
    safetensors.torch.save_file(lora, adapters.parent / "under_training.safetensors")
    values = {"lora_name": "under_training.safetensors", "strength_model": 1.0}
    tensors, losses = trained(client, adapters, "over_lora", ("LoraLoaderModelOnly", values))
    assert losses[0] != pytest.approx(plain[1][0], rel=1e-3)
    assert tensors.keys() == plain[0].keys() and any(tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize("encoded", [True, False])
def test_pictures_of_several_sizes(client, server, adapters, base_unchanged, encoded):
    """As core's folder node gives them: of any size, grey or with transparency, some of them without a caption."""
    folder = server.base / "input" / "several_sizes"
    folder.mkdir(exist_ok=True)
    for number, (size, mode) in enumerate([((64, 64), "RGB"), ((96, 64), "L"), ((64, 96), "RGBA"), ((61, 67), "RGB")]):
        Image.effect_noise(size, 60).convert(mode).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a sks thing" if number else "")
    prompt = Prompt()
    playground = Playground(prompt)
    files = prompt.add("LoadImageTextDataSetFromFolder", folder="several_sizes")
    if encoded:
        latents, positive = playground.dataset((files, 0), (files, 1))
        data = {"latents": latents, "positive": positive}
    else:
        data = {"positive": playground.text("a sks thing"), "images": (files, 0), "vae": playground.vae}
    node = playground.train(**data, steps=4, targets="cross-attention")
    playground.save((node, 0), "sizes")
    assert "step 4/4" in client.run(prompt).texts[node][-1]
