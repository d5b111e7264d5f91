"""Weights by block, and the split of SDXL's blocks between style and subject."""

import pytest
import torch

from soda.adapter import Adapter, Layer
from soda.errors import SodaMixError
from soda.mixing import OPERATORS, b_lora, mix, sum_delta
from soda.mixing.blocks import layer_weight

SDXL = "stable-diffusion-xl-v1-base/soda"


def sdxl_names(host):
    """The attention matrices of SDXL, from its shape alone: attention in two of three levels, 2 and 10 deep."""
    depth = {0: 0, 1: 2, 2: 10}
    names = []
    for level in range(3):
        for i in range(2):
            block = {"diffusers": f"down_blocks.{level}.attentions.{i}", "comfy": f"input_blocks.{1 + 3 * level + i}.1"}
            names += [(block[host], t) for t in range(depth[level])]
    names += [({"diffusers": "mid_block.attentions.0", "comfy": "middle_block.1"}[host], t) for t in range(depth[2])]
    for up, level in enumerate((2, 1, 0)):
        for i in range(3):
            block = {"diffusers": f"up_blocks.{up}.attentions.{i}", "comfy": f"output_blocks.{3 * up + i}.1"}
            names += [(block[host], t) for t in range(depth[level])]
    prefix = {"diffusers": "unet", "comfy": "diffusion_model"}[host]
    return [
        f"{prefix}.{block}.transformer_blocks.{t}.{attention}.{projection}"
        for block, t in names
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_k", "to_v", "to_out.0")
    ]


def adapter(names, role="style", architecture=SDXL, seed=0):
    g = torch.Generator().manual_seed(seed)
    layers = {name: (Layer("lq", torch.randn(3, generator=g), (torch.randn(3, generator=g),)),) for name in names}
    return Adapter(layers, {"soda.role": role, "modelspec.architecture": architecture}, f"my {role}")


@pytest.mark.parametrize("host", ["diffusers", "comfy"])
@pytest.mark.parametrize("role", ["style", "subject"])
def test_the_split_of_sdxl(host, role):
    names = sdxl_names(host)
    assert len(set(names)) == 560
    weights = b_lora(adapter(names, role), 0.8)
    inside = [name for name in names if layer_weight(weights, name) == 0.8]
    block = {
        ("diffusers", "subject"): "unet.up_blocks.0.attentions.0.",
        ("diffusers", "style"): "unet.up_blocks.0.attentions.1.",
        ("comfy", "subject"): "diffusion_model.output_blocks.0.1.",
        ("comfy", "style"): "diffusion_model.output_blocks.1.1.",
    }[host, role]
    assert inside == [name for name in names if name.startswith(block)] and len(inside) == 80
    assert all(layer_weight(weights, name) == 0 for name in names if name not in inside)


def test_style_and_subject_meet_nowhere_under_the_split():
    names = sdxl_names("comfy")
    style, subject = adapter(names), adapter(names, "subject", seed=1)
    mixed = mix([(style, b_lora(style)), (subject, b_lora(subject, 0.5))])
    assert len(mixed.layers) == 160
    for name, (layer,) in mixed.layers.items():
        source, weight = (subject, 0.5) if "output_blocks.0." in name else (style, 1.0)
        assert torch.equal(layer.delta, weight * source.layers[name][0].delta)
    kept = mix([(style, {**b_lora(style), "*": 0.3})])
    assert len(kept.layers) == 560
    assert torch.allclose(kept.layers[names[0]][0].delta, 0.3 * style.layers[names[0]][0].delta)


@pytest.mark.parametrize(
    ("architecture", "role", "names", "message"),
    [
        ("stable-diffusion-v1/soda", "style", ["a"], "stable-diffusion-v1 .'my style'"),
        ("stable-diffusion-xl-v1-refiner/soda", "style", ["a"], "not for stable-diffusion-xl-v1-refiner"),
        ("", "style", ["a"], "does not name its architecture"),
        (SDXL, "other", ["a"], "role 'other'.*subject or style"),
        (SDXL, "style", ["unet.up_blocks.0.attentions.0.to_q"], "no layer in up_blocks.0.attentions.1 or out"),
    ],
)
def test_the_split_never_guesses(architecture, role, names, message):
    with pytest.raises(SodaMixError, match=message):
        b_lora(adapter(names, role, architecture))


@pytest.mark.parametrize(
    ("layer", "weight"),
    [
        ("m.output_blocks.1.1.attn1.to_q", 0.5),
        ("m.output_blocks.1.1.attn2.to_q", 0.5),  # the longer pattern, whatever the order
        ("m.output_blocks.10.1.attn1.to_q", 0.1),
        ("m.output_blocks.10.1.attn2.to_k", 0.7),
        ("m.input_blocks.1.attn2.to_k[0:64]", 0.7),
        ("m.input_blocks.1.qkv[0:64]", 0.9),
        ("output_blocks.1", 0.5),
        ("m.xattn2.to_k", 0.1),
    ],
)
def test_the_longest_run_of_whole_parts_wins(layer, weight):
    weights = {"attn2": 0.7, "*": 0.1, "output_blocks.1": 0.5, "qkv": 0.9}
    assert layer_weight(weights, layer) == weight
    assert layer_weight(dict(reversed(weights.items())), layer) == weight
    assert layer_weight(0.25, layer) == 0.25


def test_without_a_rest_other_layers_get_nothing():
    assert layer_weight({"a.b": 2.0}, "a.c") == 0.0


def test_two_patterns_of_one_length_are_refused():
    with pytest.raises(SodaMixError, match="'attn2' and 'block'"):
        layer_weight({"block": 1.0, "attn2": 0.5}, "m.block.attn2")


def test_a_pattern_that_finds_nothing_is_refused():
    """Most likely it is misspelt, or in another host's names."""
    with pytest.raises(SodaMixError, match="'my style' has no layer in the block 'up_blocks.7'.*'m.a'"):
        mix([(adapter(["m.a"]), {"up_blocks.7": 1.0, "*": 1.0})])
    with pytest.raises(SodaMixError, match="up_blocks.7"):
        sum_delta(torch.eye(3), "m.a", [(adapter(["m.a"]), {"up_blocks.7": 1.0})], {})


def test_a_number_in_a_block_must_be_finite():
    with pytest.raises(SodaMixError, match="my style.*nan"):
        mix([(adapter(["m.a"]), {"m": float("nan")})])


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_take_weights_by_block(operator):
    one, two = adapter(["m.a", "m.b", "m.c"]), adapter(["m.a", "m.b", "m.c"], seed=1)
    mixed = mix([(one, {"a": 0.3, "b": 1.0}), (two, {"a": 0.6})], operator=operator)
    assert list(mixed.layers) == ["m.a", "m.b"]
    for name, weights in (("m.a", (0.3, 0.6)), ("m.b", (1.0, 0.0))):
        if operator == "dare":  # draws by the content of the whole adapter
            assert mixed.layers[name][0].delta.count_nonzero() <= 3
            continue
        parts = [Adapter({name: a.layers[name]}) for a in (one, two)]
        expected = mix(list(zip(parts, weights, strict=True)), operator=operator).layers[name][0]
        assert torch.allclose(mixed.layers[name][0].delta, expected.delta)
        assert torch.allclose(mixed.layers[name][0].logs[0], expected.logs[0])


def test_sum_delta_takes_weights_by_block():
    w, one = torch.eye(3), Adapter({name: (Layer("none", None, (torch.ones(3),)),) for name in ("m.a", "m.b")})
    assert sum_delta(w, "m.b", [(one, {"a": 1.0})], {}) is w
    by_block, plain = (sum_delta(w, "m.a", [(one, weight)], {}) for weight in ({"a": 0.5}, 0.5))
    assert torch.equal(by_block, plain) and not torch.equal(plain, w)


def test_a_mix_by_block_says_so():
    mixed = mix([(adapter(["m.a"]), {"m": 0.5}), (adapter(["m.a"], "subject", seed=1), 1.0)])
    assert mixed.name == "my style x blocks + my subject x 1"
    assert '"weight": {"m": 0.5}' in mixed.metadata["soda.mix"]
