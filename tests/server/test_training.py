"""SODA Train and SODA Save on the server: determinism, what is shown meanwhile, interrupts, wrong inputs."""

import pytest
import safetensors.torch
import torch
from prompts import Playground, Prompt

from runner.client import PromptFailed, Refused


def training(**settings) -> tuple[Prompt, Playground, str]:
    prompt = Prompt()
    playground = Playground(prompt)
    latents, positive = playground.drawings()
    node = playground.train(positive, latents=latents, **settings)
    return prompt, playground, node


def train_and_save(client, adapters, prefix: str, **settings) -> dict[str, torch.Tensor]:
    prompt, playground, node = training(**settings)
    playground.save((node, 0), prefix)
    before = set(adapters.glob("*.safetensors"))
    result = client.run(prompt)
    assert node in result.executed
    (new,) = set(adapters.glob("*.safetensors")) - before
    return safetensors.torch.load_file(new)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.on_cpu
@pytest.mark.parametrize("decomposition", ["lq", "svd", "qr", "none"])
def test_the_same_seed_gives_the_same_tensors_and_the_base_stays(client, adapters, base_unchanged, decomposition):
    first = train_and_save(client, adapters, "twin", decomposition=decomposition, role="subject")
    # The role changes no number, but ComfyUI does not know that and trains anew.
    second = train_and_save(client, adapters, "twin", decomposition=decomposition, role="other")
    assert same(first, second)
    assert any(tensor.abs().max() > 0 for name, tensor in first.items() if "soda_log" in name)
    assert any(name.endswith(f".soda_{decomposition}") for name in first) == (decomposition != "none")


def test_another_seed_gives_other_tensors(client, adapters):
    assert not same(
        train_and_save(client, adapters, "seed", seed=11), train_and_save(client, adapters, "seed", seed=12)
    )


def test_saving_counts_up_and_overwrites_nothing(client, adapters):
    train_and_save(client, adapters, "counted", seed=21)
    first = (adapters / "counted_00001_.safetensors").read_bytes()
    train_and_save(client, adapters, "counted", seed=22)
    assert (adapters / "counted_00002_.safetensors").is_file()
    assert (adapters / "counted_00001_.safetensors").read_bytes() == first


def test_the_node_shows_step_loss_and_time_left(client):
    prompt, playground, node = training(steps=6, seed=31)
    prompt.add("LossGraphNode", loss=(node, 1), filename_prefix="loss")
    progress = []
    result = client.run(prompt, lambda kind, data: progress.append(data) if kind == "progress" else None)
    assert "step 6/6, loss " in result.texts[node][-1]
    assert " left" in result.texts[node][-1]
    mine = [data for data in progress if data["node"] == node]
    assert mine[-1]["value"] == mine[-1]["max"] == 6


def test_images_are_encoded_when_no_latents_are_wired(client, adapters, base_unchanged):
    prompt = Prompt()
    playground = Playground(prompt)
    drawings = prompt.add("SodaPlaygroundDrawings", concept="fip")
    node = playground.train(playground.text("sks"), images=(drawings, 0), vae=playground.vae, seed=41)
    playground.save((node, 0), "from_images")
    client.run(prompt)


def test_an_interrupt_in_mid_training_leaves_the_base_as_it_was(client, adapters, base_unchanged):
    prompt, playground, node = training(steps=400, seed=51)
    playground.save((node, 0), "never")
    steps = []

    def interrupt(kind: str, data: dict) -> None:
        if kind == "progress" and data["node"] == node:
            steps.append(data["value"])
            if len(steps) == 3:
                client.interrupt()

    with pytest.raises(PromptFailed, match="interrupted") as caught:
        client.run(prompt, interrupt, timeout=120)
    assert caught.value.result.error["node"] == node
    assert steps[-1] < 200
    assert not list(adapters.glob("never*"))


def failure(client, prompt: Prompt, class_type: str) -> str:
    """The message of the error that the prompt must end with, raised by a node of that class."""
    with pytest.raises(PromptFailed) as caught:
        client.run(prompt)
    assert caught.value.result.error["type"] == class_type
    return str(caught.value)


def refusal(client, prompt: Prompt) -> str:
    with pytest.raises(Refused) as caught:
        client.run(prompt)
    assert caught.value.status == 400
    return caught.value.body


@pytest.mark.parametrize("value", [{"steps": 0}, {"batch_size": 0}, {"factors": 0}, {"learning_rate": -1.0},
                                   {"decomposition": "lu"}, {"role": "villain"}])  # fmt: skip
def test_values_out_of_range_are_refused_by_name(client, base_unchanged, value):
    prompt, playground, node = training(**value)
    playground.save((node, 0), "refused")
    assert next(iter(value)) in refusal(client, prompt)


def test_neither_latents_nor_images(client, base_unchanged):
    prompt = Prompt()
    playground = Playground(prompt)
    playground.save((playground.train(playground.text()), 0), "nothing")
    message = failure(client, prompt, "SodaTrain")
    assert "latents" in message and "wire" in message.lower()


def latent_file(server, name: str, tensor: torch.Tensor) -> str:
    tensors = {"latent_tensor": tensor, "latent_format_version_0": torch.tensor([])}
    safetensors.torch.save_file(tensors, server.base / "input" / f"{name}.latent")
    return f"{name}.latent"


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("none", torch.zeros(0, 3, 64, 64), "no latents"),
        ("nan", torch.full((1, 3, 64, 64), float("nan")), "NaN"),
        ("channels", torch.ones(1, 16, 64, 64), "takes 3 in 2. Encode the images with the VAE"),
        ("dimensions", torch.ones(1, 3, 1, 64, 64), "takes 3 in 2. Encode the images with the VAE"),
        ("empty", torch.zeros(1, 4, 64, 64), "Empty Latent Image. Wire encoded images"),
    ],
)
def test_bad_latents(client, server, base_unchanged, name, tensor, says):
    prompt = Prompt()
    playground = Playground(prompt)
    loaded = prompt.add("LoadLatent", latent=latent_file(server, name, tensor))
    playground.save((playground.train(playground.text(), latents=(loaded, 0)), 0), "bad")
    assert says in failure(client, prompt, "SodaTrain")


def test_as_many_captions_as_images(client, base_unchanged):
    prompt = Prompt()
    playground = Playground(prompt)
    images = prompt.add("EmptyImage", width=64, height=64, batch_size=3, color=0)
    single = prompt.add("RebatchImages", images=(images, 0), batch_size=1)
    latents = prompt.add("VAEEncode", pixels=(single, 0), vae=playground.vae)
    _, positive = playground.drawings()
    playground.save((playground.train(positive, latents=(latents, 0)), 0), "captions")
    message = failure(client, prompt, "SodaTrain")
    assert "3" in message and "caption" in message


def test_a_prefix_that_leaves_the_output_folder_is_refused(client, server, base_unchanged):
    prompt, playground, node = training(seed=61)
    playground.save((node, 0), "../../../escaped")
    failure(client, prompt, "SodaSave")
    assert not list(server.base.rglob("escaped*"))
