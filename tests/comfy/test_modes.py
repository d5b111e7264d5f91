"""Every precision in which ComfyUI keeps weights, every way in which it loads them: the effect is the library's, LoRAs
mean the same before and behind, and what comes off leaves the model bit for bit as it was."""

from __future__ import annotations

import comfy.model_management
import model_zoo
import pytest
import torch
from comfy.weight_adapter import BypassInjectionManager
from comfy_api.torch_helpers import set_torch_compile_wrapper
from quantised_models import FORMATS, GGUF, RAW, ROTATED, WIDTH, quantise, quantised_model, unpacked
from small_models import CONTEXT, adapter, conditioning, latents, load, lora, small_clip, small_model
from soda_pack.soda.adapt import adapt
from soda_pack.soda.adapter import Adapter, Layer
from soda_pack.soda.decomposition import decompose
from soda_pack.soda.errors import SodaTrainingError
from soda_pack.soda.hosts.comfy.patch import apply
from soda_pack.soda.hosts.comfy.targets import attention_weights
from soda_pack.soda.kronecker import factor_sizes
from test_fit import sketched
from training import run

import nodes as comfy_nodes

CPU = torch.device("cpu")
QUANTISED = (*RAW, *FORMATS, GGUF)
# Formats whose kernels round the activations too: there a rotated input is rounded otherwise.
ROUGH = {"int8_tensorwise": 0.02, "convrot_w4a4": 0.25, "asym_w4a8_int8": 0.03}


def computed(model):
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return model.model.apply_model(x.to(model.model.get_dtype_inference()), torch.tensor([3.0]),
                                       c_crossattn=conditioning()[0][0])  # fmt: skip


def output(model):
    load(model)
    return computed(model)


def low_vram_output(model):
    """As on a GPU with next to no memory (--novram): each weight is patched in each forward."""
    comfy.model_management.unload_all_models()
    with torch.inference_mode():
        model.patch_model(CPU, lowvram_model_memory=1)
        assert model.model.model_lowvram
        try:
            return computed(model)
        finally:
            model.unpatch_model(CPU)


def reference(model, one, strength=1.0):
    """The output of a full-precision model with the weights of `model`, adapted by the library."""
    base = unpacked(model)
    plain = small_model(0, WIDTH)
    with torch.inference_mode():
        for key, weight in base.items():
            plain.model.get_parameter(key).copy_(weight)
        for layer, key in attention_weights(model).items():
            (term,) = one.layers[layer]
            bases = {} if term.delta is None else {term.decomposition: decompose(base[key], term.decomposition)}
            plain.model.get_parameter(key).copy_(adapt(base[key], [term.scaled(strength)], bases))
    return output(plain)


def off(found, expected, base):
    """The error as a share of the effect."""
    return ((found - expected).norm() / (expected - base).norm()).item()


@pytest.mark.parametrize("form", QUANTISED, ids=str)
def test_quantised_weights_stay_and_the_adapter_is_exact(form):
    model = quantised_model(form)
    before = unpacked(model)
    base, one = output(model), adapter(model, decomposition="lq")
    patched, _, report = apply(model, [(one, 0.8)])
    assert report.bypassed and "in bypass" in report.text() and not report.warnings
    found = output(patched)
    loaded = unpacked(patched)
    assert all(torch.equal(before[key], loaded[key]) for key in before)
    error = off(found, reference(model, one, 0.8), base)
    assert error < ROUGH.get(form, 1e-4)
    merged, _, report = apply(model, [(one, 0.8)], mode="merge")
    assert not report.bypassed
    if form != GGUF:  # which is never packed again
        assert off(output(merged), reference(model, one, 0.8), base) > max(error, 3e-3)
    assert torch.equal(output(model), base)
    after = unpacked(model)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("decomposition", ["lq", "svd", "qr", "none"])
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_bypass_of_plain_weights_is_the_merge(decomposition, strength):
    model = small_model()
    one = adapter(model, decomposition=decomposition)
    base = output(model)
    expected = output(apply(model, [(one, strength)], mode="merge")[0])
    patched, _, report = apply(model, [(one, strength)], mode="bypass")
    assert report.bypassed == report.changed == len(one.layers) and not patched.patches
    assert off(output(patched), expected, base) < 1e-4
    assert off(low_vram_output(patched), expected, base) < 1e-4
    assert torch.equal(output(model), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_vram_is_the_merge(dtype):
    """In half precision the merged weight is rounded to it and the one made in a forward is not."""
    model = small_model(dtype=dtype)
    one = adapter(model)
    base = output(model)
    patched = apply(model, [(one, 1.0)])[0]
    patched.add_patches(lora(model), 0.8)
    expected = output(patched)
    found = low_vram_output(patched)
    assert off(found, expected, base) < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert torch.equal(low_vram_output(patched), found)
    assert torch.equal(output(model), base)


@pytest.mark.parametrize("decomposition", ["lq", "qr"])
@pytest.mark.parametrize("form", [torch.float8_e4m3fn, "float8_e4m3fn", "nvfp4", GGUF], ids=str)
def test_a_lora_before_is_a_lora_behind(form, decomposition):
    model = quantised_model(form)
    one, base = adapter(model, decomposition=decomposition), output(model)
    before = model.clone()
    before.add_patches(lora(model), 0.8)
    alone = output(before)
    before, behind = apply(before, [(one, 1.0)])[0], apply(model, [(one, 1.0)])[0].clone()
    behind.add_patches(lora(model), 0.8)
    found = output(behind)
    assert torch.equal(output(before), found) and not torch.equal(found, alone)
    assert torch.equal(output(model), base)


def test_a_lora_adds_in_bypass_what_it_adds_in_the_merge():
    """Also a plain difference, and with the rotation on either side."""
    model = small_model()
    base = output(model)
    change = {k: ("diff", (p.weights[0] @ p.weights[1],)) for k, p in lora(model, seed=8).items()}
    for decomposition in ("lq", "qr"):
        found = []
        for mode in ("merge", "bypass"):
            patched = apply(model, [(adapter(model, decomposition=decomposition), 1.0)], mode=mode)[0]
            patched.add_patches(lora(model), 0.8)
            patched.add_patches(change, 0.5)
            found.append(output(patched))
        assert off(found[1], found[0], base) < 1e-4


def test_chained_loaders_in_bypass_are_one_mix():
    model = quantised_model("float8_e4m3fn")
    base, a, b = output(model), adapter(model, 1, name="a"), adapter(model, 5, name="b", decomposition="svd")
    chained = output(apply(apply(model, [(a, 0.6)])[0], [(b, -0.4)])[0])
    assert torch.equal(chained, output(apply(apply(model, [(b, -0.4)])[0], [(a, 0.6)])[0]))
    assert torch.equal(chained, output(apply(model, [(a, 0.6), (b, -0.4)])[0]))
    assert not torch.equal(chained, base) and torch.equal(output(model), base)
    kept, _, report = apply(apply(model, [(a, 0.6)])[0], [(b, 0.0)])
    assert report.bypassed and torch.equal(output(kept), output(apply(model, [(a, 0.6)])[0]))


def test_a_forced_mode_holds_for_the_whole_chain():
    model = small_model()
    a, b = adapter(model, 1, name="a"), adapter(model, 5, name="b")
    first = apply(model, [(a, 1.0)], mode="bypass")[0]
    both, _, report = apply(first, [(b, 1.0)])
    assert report.bypassed == report.changed and not both.patches
    merged, _, report = apply(both, [(b, 1.0)], mode="merge")
    assert not report.bypassed and not merged.injections and not merged.additional_models


@pytest.mark.parametrize("name", ["Flux", "ZImage", "SD3"])
def test_rows_of_fused_weights_in_bypass(name):
    model = model_zoo.build(name)
    one = adapter(model)
    assert any("[" in layer for layer in one.layers)
    base = zoo_output(name, model)
    expected = zoo_output(name, apply(model, [(one, 1.0)], mode="merge")[0])
    patched = apply(model, [(one, 1.0)], mode="bypass")[0]
    assert not patched.patches and off(zoo_output(name, patched), expected, base) < 1e-3
    patched.add_patches(lora(model), 0.5)
    merged = apply(model, [(one, 1.0)], mode="merge")[0]
    merged.add_patches(lora(model), 0.5)
    assert off(zoo_output(name, patched), zoo_output(name, merged), base) < 1e-3
    assert torch.equal(zoo_output(name, model), base)


def zoo_output(name, model):
    with torch.inference_mode():
        (latent,) = comfy_nodes.common_ksampler(
            model, 0, 1, 1.0, "euler", "normal", model_zoo.conditioning(name), [], model_zoo.latents(name, model, 1)
        )
    return latent["samples"]


def test_text_encoders_in_bypass():
    clip = small_clip()
    layers = {
        f"clip_l.transformer.text_model.encoder.layers.{i}.self_attn.{p}_proj": (
            Layer("none", None, (torch.ones(CONTEXT * (CONTEXT - 1) // 2) * 0.02,)),
        )
        for i in (0, 1) for p in "qkv"
    }  # fmt: skip
    one = Adapter({**adapter(small_model()).layers, **layers}, {}, "both")

    def encoded(clip):
        with torch.inference_mode():
            return clip.encode_from_tokens(clip.tokenize("a cat"))

    base = encoded(clip)
    merged = encoded(apply(small_model(), [(one, 1.0)], clip, mode="merge")[1])
    new = apply(small_model(), [(one, 1.0)], clip, mode="bypass")[1]
    assert off(encoded(new), merged, base) < 5e-3  # the merged weights are rounded to fp16
    assert torch.equal(encoded(clip), base)


def test_other_bypass_loaders_stand_beside():
    """Core's own loader in bypass, put on before and behind; neither leaves anything in the modules."""
    model = small_model()
    one, base = adapter(model), output(model)
    forwards = {name for name, module in model.model.named_modules() if "forward" in module.__dict__}
    expected = apply(model, [(one, 1.0)])[0]
    expected.add_patches(lora(model), 1.0)
    expected = output(expected)

    def core(patcher):
        manager = BypassInjectionManager()
        for key, patch in lora(model).items():
            manager.add_adapter(key, patch, 1.0)
        patcher = patcher.clone()
        patcher.set_injections("bypass_lora", manager.create_injections(patcher.model))
        return patcher

    before = core(apply(model, [(one, 1.0)], mode="bypass")[0])
    behind = apply(core(model), [(one, 1.0)], mode="bypass")[0]
    for patcher in (before, behind):
        for _ in range(3):
            assert off(output(patcher), expected, base) < 1e-4
            assert torch.equal(output(model), base)
    stale = [m.forward for _, m in model.model.named_modules() if hasattr(m.__dict__.get("forward"), "soda_before")]
    assert not forwards and all(not hasattr(forward.soda_before, "soda_before") for forward in stale)


@pytest.mark.parametrize("mode", ["merge", "bypass"])
def test_torch_compile(mode):
    """As core's TorchCompileModel does it, of one block only and without inductor, which would take a minute."""
    model = small_model()
    one, base = adapter(model), sampled(model, steps=1)
    patched = apply(model, [(one, 1.0)], mode=mode)[0]
    compiled, block = patched.clone(disable_dynamic=True), "diffusion_model.middle_block.1.transformer_blocks.0"
    set_torch_compile_wrapper(model=compiled, backend="eager", keys=[block])
    assert off(sampled(compiled, steps=1), sampled(patched, steps=1), base) < 1e-4
    assert torch.equal(sampled(model, steps=1), base)


def sampled(model, positive=None, steps=2):
    with torch.inference_mode():
        (latent,) = comfy_nodes.common_ksampler(
            model, 0, steps, 1.0, "euler", "normal", positive or conditioning(), [], latents(1)
        )
    return latent["samples"]


@pytest.mark.parametrize("form", [torch.float8_e4m3fn, *(f for f in FORMATS if f not in ROTATED)], ids=str)
def test_training_on_quantised_weights(form):
    model = quantised_model(form)
    before, base = unpacked(model), output(model)
    one, _ = run(model, 3)
    after = unpacked(model)
    assert all(torch.equal(before[key], after[key]) for key in before) and torch.equal(output(model), base)
    assert all(terms[0].delta.count_nonzero() for terms in one.layers.values())
    patched, _, report = apply(model, [(one, 1.0)])
    assert report.bypassed and not report.warnings and not torch.equal(output(patched), base)
    two, _ = run(patched, 1)
    assert two.layers.keys() == one.layers.keys() and torch.equal(output(model), base)


@pytest.mark.parametrize("form", [GGUF, *(f for f in ROTATED if f in FORMATS)])
def test_training_where_gradients_cannot_pass_is_refused_with_the_way_out(form):
    model = quantised_model(form)
    with pytest.raises(SodaTrainingError, match=f"(?i){form}.*Train on the same model in fp16"):
        run(model, 1)


@pytest.mark.parametrize("form", ["float8_e4m3fn", "mxfp8", "int8_tensorwise"])
@pytest.mark.parametrize("shape", [(640, 640), (1280, 1280), (1280, 2048)])
def test_a_rotation_does_on_8_bits_what_it_does_on_16(form, shape):
    """The share of its effect that is lost is that of the weight, about 2.6 % for fp8: the bar is 3.5 %."""
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(shape, generator=generator) * 0.03).half().float()
    logs = tuple(torch.randn(n * (n - 1) // 2, generator=generator) * 0.02 for n in factor_sizes(shape[1], 3))
    turn = [Layer("none", None, logs)]
    change = adapt(weight, turn, {}) - weight
    coarse = quantise(weight, form).dequantize()
    turned = adapt(coarse, turn, {})
    error = (turned - coarse - change).norm() / change.norm()
    again = (quantise(turned, form).dequantize() - coarse - change).norm() / change.norm()  # merged: rounded again
    assert error < 0.035 and again > 2 * error


def test_the_spectrum_of_a_16_bit_base_on_8_bits_is_told():
    """lq keeps most of it; svd does not survive the rounding, and the node says so and names the ways out."""
    plain = small_model(0, WIDTH)
    model = quantised_model("float8_e4m3fn", plain=plain)
    _, _, report = apply(model, [(sketched(plain, "lq"), 1.0)])
    assert len(report.warnings) == 1 and "its spectrum is off by about" in report.warnings[0]
    _, _, report = apply(model, [(sketched(plain, "svd"), 1.0)])
    assert len(report.warnings) == 1 and "only its rotation is applied. With that model" in report.warnings[0]
