"""Trainings on a GPU: what they leave there, however they end, and what they find.

Collected where COMFYUI_ARGUMENTS lets the server use one, for instance "--use-pytorch-cross-attention".
"""

import time

import pytest
import safetensors.torch
import torch
from prompts import Playground, Prompt, latent_of

from runner.client import PromptFailed

STEPS = 8
SETTINGS = {
    "fast": {"memory": "fast"}, "frugal": {"memory": "frugal"}, "low VRAM": {"memory": "low VRAM"},
    "svd": {"decomposition": "svd"}, "dco": {"loss": "dco", "loss.beta": 500.0, "accumulation": 2, "ema": 0.9},
    "samples": {"sample_prompt": "a sks monster", "sample_every": 2},
    "augmented": {"augment": "on", "augment.views": 2, "augment.flip": True, "augment.crop": 0.1,
                  "augment.colour": 0.1},
}  # fmt: skip
DIRECTLY = ("decomposition", "sample_prompt", "batch_size", "targets", "seed")  # inputs of SODA Train itself


def training(**settings) -> tuple[Prompt, str]:
    prompt = Prompt()
    playground = Playground(prompt)
    own = {name: settings.pop(name) for name in DIRECTLY if name in settings}
    data = {"positive": playground.text("sks monster")}
    if "augment" in settings:
        data["images"] = (prompt.add("SodaPlaygroundDrawings", concept="fip"), 0)
    elif (latents := settings.pop("latents", None)) is not None:
        data["latents"] = (prompt.add("LoadLatent", latent=latents), 0)
        if room := settings.pop("room", 0):
            data["latents"] = (prompt.add("LittleMemory", latents=data["latents"], room=room), 0)
    else:
        data["latents"], data["positive"] = playground.drawings()
    node = playground.train(
        **{"batch_size": 1, **own}, **data, steps=STEPS, reuse=False, clip=playground.clip, vae=playground.vae,
        options=playground.options(checkpoint_every=2, **settings),
    )  # fmt: skip
    prompt.add("PreviewAny", source=(node, 2))
    return prompt, node


def ended(client, server) -> None:
    """Trainings that end as they should, by each plan and with what else takes memory."""
    for name, settings in SETTINGS.items():
        prompt, node = training(**settings)
        said = client.run(prompt).texts[node]
        assert f"step {STEPS}/{STEPS}" in said[-1]
        assert name not in ("fast", "frugal", "low VRAM") or any(f"Memory plan: {name}" in text for text in said)


def stopped(client, server) -> None:
    prompt, node = training()

    def stop(kind: str, data: dict) -> None:
        if kind == "soda.training" and data["node"] == node and data["done"] >= 3 and data["state"] == "running":
            client.post("/soda/training/stop", {"node": node, "prompt": data["prompt"]})

    client.run(prompt, stop)


def cancelled(client, server) -> None:
    prompt, node = training()

    def cancel(kind: str, data: dict) -> None:
        if kind == "progress" and data["node"] == node and data["value"] == 3:
            client.interrupt()

    with pytest.raises(PromptFailed, match="interrupted"):
        client.run(prompt, cancel)


def diverged(client, server) -> None:
    pictures = {"latent_tensor": torch.full((1, 3, 16, 16), 1e30), "latent_format_version_0": torch.tensor([])}
    safetensors.torch.save_file(pictures, server.base / "input" / "too_large.latent")
    prompt, _ = training(latents="too_large.latent")
    with pytest.raises(PromptFailed, match="after 3 times going back"):
        client.run(prompt)


def out_of_memory(client, server) -> None:
    pictures = {"latent_tensor": torch.randn(64, 3, 64, 64), "latent_format_version_0": torch.tensor([])}
    safetensors.torch.save_file(pictures, server.base / "input" / "many.latent")
    prompt, node = training(latents="many.latent", memory="fast", batch_size=64, room=96)
    try:
        with pytest.raises(PromptFailed, match="not enough for batches of 64") as caught:
            client.run(prompt)
    finally:
        prompt = Prompt()
        latents = (prompt.add("LoadLatent", latent="many.latent"), 0)
        prompt.add("LittleMemory", latents=latents, room=0)
        client.run(prompt)
    assert "was not enough for the plan frugal" in caught.value.result.texts[node][-1]


def held(client) -> tuple[int, int]:
    """Bytes that torch holds on the GPU with all models unloaded and all results dropped, and that are not free."""
    client.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)  # it frees between prompts
    (device,) = client.get_json("/system_stats")["devices"]
    assert device["type"] == "cuda"
    return device["torch_vram_total"] - device["torch_vram_free"], device["vram_total"] - device["vram_free"]


@pytest.mark.parametrize("outcome", [ended, stopped, cancelled, diverged, out_of_memory], ids=lambda o: o.__name__)
def test_nothing_stays_on_the_gpu(client, server, base_unchanged, outcome):
    """The first time libraries take what they keep for good."""
    outcome(client, server)
    before = held(client)
    outcome(client, server)
    after = held(client)
    print(f"{outcome.__name__}: {before} bytes before, {after} after")
    assert after[0] == before[0]
    assert after[1] <= before[1] + 2**23


def losses(client, plan: str) -> list[float]:
    prompt, node = training(memory=plan, targets="cross-attention", seed=21)
    client.run(prompt)
    (told,) = [t for t in client.get_json("/soda/training")["trainings"] if t["node"] == node][-1:]
    return [loss for _, loss, _ in told["points"]]


@pytest.mark.parametrize("plan", ["fast", "frugal", "low VRAM"])
def test_training_and_sampling_keep_no_weight_of_an_adapter_sampled_before(client, style, base, look_at_base, plan):
    """With dynamic VRAM all clones of a model share the weights on the device, patched ones included."""
    look_at_base()  # unloads everything
    expected = losses(client, plan)
    prompt = Prompt()
    playground = Playground(prompt)
    playground.sample((playground.load(style, 3.0), 0), again=True)
    client.run(prompt)
    assert losses(client, plan) == pytest.approx(expected, rel=1e-3)
    prompt = Prompt()
    playground = Playground(prompt)
    node = playground.sample(playground.model, again=True)
    assert torch.equal(latent_of(client, client.run(prompt), node), base[0])
