"""SODA Convert and SODA Transport through the server: what they say, and who reads what they write."""

import torch
from device import ON_CPU
from prompts import Playground, Prompt, latent_of


def lora_names(client) -> list[str]:
    inputs = client.get_json("/object_info/LoraLoaderModelOnly")["LoraLoaderModelOnly"]["input"]
    return inputs["required"]["lora_name"][0]


def test_a_full_difference_does_what_the_adapter_does_in_core_s_loaders(client, subject, base_latent):
    prompt = Prompt()
    playground = Playground(prompt)
    loaded = playground.load(subject)
    model = playground.model
    baked = prompt.add(
        "SodaConvert", model=model, adapter=(loaded, 2), to="full difference", filename_prefix="baked/subject"
    )
    applied = prompt.add("LoraModelLoader", model=model, lora=(baked, 0), strength_model=1.0, bypass=False)
    nodes = [playground.sample((applied, 0)), playground.sample((loaded, 0))]
    result = client.run(prompt)
    assert "keeps all of the change" in result.texts[baked][-1]
    found, expected = (latent_of(client, result, node) for node in nodes)
    assert torch.allclose(found, expected, atol=2e-3) and (expected - base_latent).abs().max() > 2e-2
    assert "baked/subject_00001_.safetensors" in lora_names(client)

    prompt = Prompt()
    playground = Playground(prompt)
    inputs = {"lora_name": "baked/subject_00001_.safetensors", "strength_model": 1.0}
    node = playground.sample((prompt.add("LoraLoaderModelOnly", model=playground.model, **inputs), 0))
    assert torch.allclose(latent_of(client, client.run(prompt), node), expected, atol=2e-3)


def test_a_lora_says_how_much_it_keeps(client, subject):
    prompt = Prompt()
    playground = Playground(prompt)
    inputs = {"model": playground.model, "adapter": (playground.load(subject), 2), "filename_prefix": "small"}
    node = prompt.add("SodaConvert", **inputs, **{"to": "LoRA", "to.rank": 8})
    said = client.run(prompt).texts[node][-1]
    assert "Saved output/loras/small_00001_.safetensors" in said
    assert "rank 8 keeps" in said and "% of the change" in said


def test_transport_to_the_same_model_keeps_everything(client, subject):
    prompt = Prompt()
    playground = Playground(prompt)
    loaded = playground.load(subject)
    moved = prompt.add("SodaTransport", model=playground.model, new_model=playground.model, adapter=(loaded, 2))
    mix = prompt.add("SodaMix", model=playground.model, row="none", **{"adapters.adapter0": (moved, 0)})
    nodes = [playground.sample((mix, 0)), playground.sample((loaded, 0))]
    result = client.run(prompt)
    assert result.texts[moved][-1] == "100% of the spectrum's change has a place in playground"
    found, expected = (latent_of(client, result, node) for node in nodes)
    assert torch.allclose(found, expected, atol=1e-4 if ON_CPU else 5e-3)  # a GPU samples in half precision
