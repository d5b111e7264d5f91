"""SODA Loader and SODA Mix through the stock sampler: strengths, folding, requeueing, caching."""

import pytest
import torch
from prompts import Playground, Prompt, latent_of


def run(client, build) -> tuple[torch.Tensor, object, Prompt]:
    """Samples with the model that build(playground) returns -> latent, result, prompt."""
    prompt = Prompt()
    playground = Playground(prompt)
    node = playground.sample(build(playground), again=True)
    result = client.run(prompt)
    return latent_of(client, result, node), result, prompt


def loaded(name: str, strength: float = 1.0):
    return lambda playground: (playground.load(name, strength), 0)


def test_an_adapter_changes_the_picture_and_its_absence_changes_it_back(client, subject, base_latent, base_unchanged):
    latent, _, _ = run(client, loaded(subject))
    assert (latent - base_latent).abs().max() > 1e-4


def test_strength_zero_is_the_base_bit_for_bit(client, subject, base_latent):
    latent, _, _ = run(client, loaded(subject, 0.0))
    assert torch.equal(latent, base_latent)


def test_a_mix_with_all_weights_zero_is_the_base_bit_for_bit(client, subject, style, base_latent):
    latent, _, _ = run(client, lambda playground: (playground.mix([(subject, 0.0), (style, 0.0)]), 0))
    assert torch.equal(latent, base_latent)


def test_the_same_prompt_queued_again_gives_the_same_bits(client, subject, base_unchanged):
    first, _, _ = run(client, loaded(subject, 0.7))
    run(client, loaded(subject, -1.5))
    second, _, _ = run(client, loaded(subject, 0.7))
    assert torch.equal(first, second)


def test_an_unchanged_prompt_is_answered_from_the_cache(client, subject):
    prompt = Prompt()
    playground = Playground(prompt)
    playground.sample((playground.load(subject), 0))
    client.run(prompt)
    result = client.run(prompt)
    assert set(result.cached) == set(prompt)


def test_a_replaced_file_is_read_again(client, adapters, subject, style):
    file = adapters / "replaced.safetensors"
    file.write_bytes((adapters / subject).read_bytes())
    first, _, _ = run(client, loaded(file.name))
    file.write_bytes((adapters / style).read_bytes())
    second, _, _ = run(client, loaded(file.name))
    file.unlink()
    expected, _, _ = run(client, loaded(style))
    assert not torch.equal(first, second)
    assert torch.equal(second, expected)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.6, -0.4)])
def test_several_loaders_in_either_order_are_one_mix(client, subject, style, weights):
    parts = list(zip((subject, style), weights, strict=True))

    def chained(parts):
        def build(playground):
            model = playground.model
            for name, weight in parts:
                model = (playground.load(name, weight, model), 0)
            return model

        return build

    mixed, _, _ = run(client, lambda playground: (playground.mix(parts), 0))
    for order in (parts, parts[::-1]):
        latent, _, _ = run(client, chained(order))
        assert torch.equal(latent, mixed)
    reversed_mix, _, _ = run(client, lambda playground: (playground.mix(parts[::-1]), 0))
    assert torch.equal(reversed_mix, mixed)


def test_a_mix_of_one_is_that_adapter(client, subject):
    alone, _, _ = run(client, loaded(subject, 0.8))
    mixed, _, _ = run(client, lambda playground: (playground.mix([(subject, 0.8)]), 0))
    assert torch.equal(alone, mixed)


def test_a_stack_is_the_same_as_the_rows(client, subject, style):
    def stacked(playground):
        first = playground.prompt.add("SodaStack", adapter_name=subject, strength=0.8, strength_clip=1.0)
        both = playground.prompt.add(
            "SodaStack", adapter_name=style, strength=-0.3, strength_clip=1.0, lora_stack=(first, 0)
        )
        mix = playground.mix([])
        playground.prompt[mix]["inputs"]["lora_stack"] = [both, 0]
        return (mix, 0)

    expected, _, _ = run(client, lambda playground: (playground.mix([(subject, 0.8), (style, -0.3)]), 0))
    assert torch.equal(run(client, stacked)[0], expected)


def test_the_node_says_how_many_layers_it_changed(client, subject):
    _, result, prompt = run(client, loaded(subject, 0.9))
    (node,) = [name for name, entry in prompt.items() if entry["class_type"] == "SodaLoader"]
    assert "layers changed" in result.texts[node][-1]
    assert "did not match" not in result.texts[node][-1]


def test_a_mix_can_be_saved_and_loaded_as_one_file(client, adapters, subject, style):
    prompt = Prompt()
    playground = Playground(prompt)
    mix = playground.mix([(subject, 0.5), (style, 0.5)])
    playground.save((mix, 2), "test_mix")
    direct = playground.sample((mix, 0), again=True)
    before = set(adapters.glob("test_mix_*"))
    result = client.run(prompt)
    (saved,) = set(adapters.glob("test_mix_*")) - before
    assert saved.stat().st_size < 1.1 * (adapters / subject).stat().st_size
    latent, _, _ = run(client, loaded(saved.name))
    # One rounding of the sum to fp32 lies between the two.
    assert torch.allclose(latent, latent_of(client, result, direct), atol=1e-4)
