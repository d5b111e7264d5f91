"""SODA files in ComfyUI's own LoRA loaders, beside LoRAs, and core's own trainer with the class registered."""

from __future__ import annotations

import gc
import logging
import weakref

import comfy.weight_adapter
import model_zoo
import pytest
import torch
from comfy.lora import load_lora
from comfy.model_patcher import LowVramPatch
from comfy_extras.nodes_lora_debug import LoraLoaderBypassModelOnly
from comfy_extras.nodes_train import TrainLoraNode
from small_models import CONTEXT, adapter, conditioning, latents, load, lora, same, small_clip, small_model, weights
from soda_pack.soda.adapter import Adapter, Layer
from soda_pack.soda.errors import SodaFileError, SodaMixError
from soda_pack.soda.file import save
from soda_pack.soda.fit import rotation_only
from soda_pack.soda.hosts.comfy import base, stock
from soda_pack.soda.hosts.comfy.base import CACHE, unpatched
from soda_pack.soda.hosts.comfy.patch import apply
from soda_pack.soda.hosts.comfy.targets import attention_weights
from test_fit import sketched

import nodes as comfy_nodes

pytestmark = pytest.mark.usefixtures("loras")


def through_core(model, folder, one, strength=1.0, clip=None, strength_clip=1.0):
    """The adapter saved as a file and loaded by *Load LoRA*."""
    save(one, folder / "one.safetensors")
    with torch.inference_mode():
        return comfy_nodes.LoraLoader().load_lora(model, clip, "one.safetensors", strength, strength_clip)


def loaded(model):
    load(model)
    return weights(model)


def near(a, b, tolerance=2e-6):
    assert a.keys() == b.keys()
    return all(torch.allclose(a[key], b[key], atol=tolerance) for key in a)


def test_registering_twice_is_registering_once():
    before = list(comfy.weight_adapter.adapters)
    stock.register()
    assert comfy.weight_adapter.adapters == before and before.count(stock.StockAdapter) == 1


@pytest.mark.parametrize("decomposition", ["lq", "svd", "qr", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_load_lora_equals_soda_loader_bit_for_bit(loras, decomposition, dtype):
    model = small_model(dtype=dtype)
    one = adapter(model, decomposition=decomposition)
    base = loaded(model)
    there = loaded(through_core(model, loras, one)[0])
    here = loaded(apply(model, [(one, 1.0)])[0])
    assert same(there, here) and not same(there, base)
    assert same(loaded(model), base)


def test_whoever_decomposes_first_the_other_need_not(loras, monkeypatch):
    model = small_model(seed=11, dtype=torch.float16)
    one = adapter(model)
    apply(model, [(one, 1.0)])
    monkeypatch.setattr(stock, "decompose_all", None)
    loaded(through_core(model, loras, one)[0])


@pytest.mark.parametrize("strength", [-1.0, 0.3, 2.0])
@pytest.mark.parametrize("decomposition", ["lq", "svd"])
def test_strength_is_linear_in_the_file(loras, decomposition, strength):
    """Within rounding: SODA Loader weighs in fp64, here the numbers are fp32."""
    model = small_model()
    one = adapter(model, decomposition=decomposition)
    there = loaded(through_core(model, loras, one, strength)[0])
    assert near(there, loaded(apply(model, [(one, strength)])[0]))
    assert not near(there, loaded(apply(model, [(one, 1.0)])[0]), 1e-3)


def test_a_lora_after_it_adds_what_it_adds_to_soda_loader(loras):
    model = small_model()
    one = sketched(model, "lq")
    there = through_core(model, loras, one)[0].clone()
    there.add_patches(lora(model), 0.8)
    here = apply(model, [(one, 1.0)])[0]
    here.add_patches(lora(model), 0.8)
    assert near(loaded(there), loaded(here))


def test_behind_a_lora_only_the_rotation_applies_and_the_log_says_so(loras, caplog):
    model = small_model()
    one = sketched(model, "svd")
    strong = {key: replace_up(patch, 30.0) for key, patch in lora(model).items()}
    before = model.clone()
    before.add_patches(strong)
    patched = loaded(before)
    with caplog.at_level(logging.WARNING):
        there = loaded(through_core(before, loras, one)[0])
    said = [record.message for record in caplog.records if "only the rotation" in record.message]
    assert len(said) == 1 and "behind another patch" in said[0] and "SODA Loader" in said[0]
    bare = small_model()
    with torch.inference_mode():
        for key in attention_weights(bare).values():
            bare.model_state_dict()[key].copy_(patched[key])
    turned = Adapter(rotation_only(one.layers), {}, "turned")
    assert near(there, loaded(apply(bare, [(turned, 1.0)])[0]), 1e-4)


def replace_up(patch, factor):
    up, *rest = patch.weights
    return type(patch)(set(), (up * factor, *rest))


@pytest.fixture
def decomposed(monkeypatch):
    """A list with an entry for every decomposition."""
    found, plain = [], stock.decompose_all
    monkeypatch.setattr(stock, "decompose_all", lambda *args, **kwargs: found.append(1) or plain(*args, **kwargs))
    return found


@pytest.mark.parametrize("decomposition", ["lq", "svd", "qr"])
def test_without_memory_for_bases_all_applies_and_nothing_is_kept(loras, monkeypatch, decomposed, decomposition):
    model = small_model(seed=12)
    one = sketched(model, decomposition)
    expected = loaded(apply(model, [(one, 1.0)])[0])
    monkeypatch.setattr(base, "basis_bounds", lambda: (1000, 0))
    there = through_core(model, loras, one)[0]
    assert same(loaded(there), expected)
    met = weakref.ref(next(iter(there.patches.values()))[0][1].weights[2])
    assert len(decomposed) == len(met().bases) == 56 and not any(met().bases.values()) and CACHE.size <= 1000
    load(model)
    for key in list(attention_weights(model).values())[:3]:  # under low VRAM, in every forward
        lazy, weight = LowVramPatch(key, there.patches), weights(model)[key]
        assert torch.equal(lazy(weight.clone()), expected[key])
        before = len(decomposed)
        assert all(torch.equal(lazy(weight.clone()), expected[key]) for _ in range(2)) and len(decomposed) == before
    assert sum(basis is not None for basis in met().bases.values()) == 3
    del there, lazy
    gc.collect()
    assert met() is None  # though the file is still known


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_memory_for_bases_none_are_kept_however_often_a_model_is_loaded(loras, monkeypatch, decomposed, dtype):
    """But of an fp32 model, whose merges look like forwards."""
    model = small_model(seed=15, dtype=dtype)
    monkeypatch.setattr(base, "basis_bounds", lambda: (0, 0))
    there = through_core(model, loras, sketched(model, "lq"))[0]
    for _ in range(3):
        expected = loaded(there)
        load(model)
    assert same(loaded(there), expected) and CACHE.size == 0
    met = next(iter(there.patches.values()))[0][1].weights[2]
    kept = sum(basis is not None for basis in met.bases.values())
    assert (kept, len(decomposed)) == ((56, 2 * 56) if dtype == torch.float32 else (0, 4 * 56))


def test_a_changed_strength_computes_and_writes_nothing_again(loras, monkeypatch, decomposed):
    monkeypatch.setattr(base, "basis_bounds", lambda: (1 << 30, 1 << 30))
    model = small_model(seed=13)
    one = sketched(model, "lq")
    loaded(through_core(model, loras, one, 0.5)[0])
    written = []
    monkeypatch.setattr(CACHE, "put", lambda *args: written.append(args))
    again = loaded(through_core(model, loras, one, 1.0)[0])
    assert len(decomposed) == 56 and not written
    assert same(again, loaded(apply(model, [(one, 1.0)])[0]))


def test_behind_changing_loras_no_bases_pile_up(loras, monkeypatch):
    monkeypatch.setattr(stock, "_kept", {})
    model = small_model(seed=14)
    one = adapter(model)  # without sketches: its spectrum applies behind anything
    sizes = []
    for strength in (0.1, 0.2, 0.3, 0.4):
        before = model.clone()
        before.add_patches(lora(model), strength)
        loaded(through_core(before, loras, one)[0])
        sizes.append(CACHE.size)
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3]


def test_rows_of_fused_weights(loras):
    model = model_zoo.build("Flux")
    one = adapter(model)
    assert any("[48:96]" in layer for layer in one.layers)
    there = through_core(model, loras, one)[0]
    assert all(len(entries) == 1 for entries in there.patches.values())
    assert same(loaded(there), loaded(apply(model, [(one, 1.0)])[0]))


def test_text_encoders_have_a_strength_of_their_own(loras):
    model, clip = small_model(), small_clip()
    text = weights(clip.patcher)
    layer = "clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj"
    both = Adapter({**adapter(model).layers, layer: (Layer("none", None, (torch.ones(CONTEXT * 47 // 2),)),)}, {})
    new_model, new_clip = through_core(model, loras, both, 1.0, clip, 0.5)
    after = loaded(new_clip.patcher)
    expected = apply(model, [(both, 1.0)], clip, [(both, 0.5)])[1]
    assert near(after, loaded(expected.patcher)) and not same(after, text)
    assert same(loaded(new_model), loaded(apply(model, [(both, 1.0)])[0]))


def test_nothing_is_reported_missing(loras, caplog):
    with caplog.at_level(logging.WARNING):
        through_core(small_model(), loras, sketched(small_model(), "lq"))
    assert not [record for record in caplog.records if "not loaded" in record.message.lower()]


def test_under_low_vram_a_weight_is_decomposed_once(loras, monkeypatch):
    model = small_model(seed=12)
    one = sketched(model, "lq")
    patched = through_core(model, loras, one)[0]
    key = next(iter(attention_weights(model).values()))
    lazy = LowVramPatch(key, patched.patches)
    assert lazy.memory_required() > 0
    first = lazy(unpatched(model, key).clone())
    monkeypatch.setattr(stock, "decompose_all", None)
    assert torch.equal(first, lazy(unpatched(model, key).clone()))
    prepared = torch.empty(lazy.memory_required(), dtype=torch.uint8)
    lazy.prepare(prepared, None)
    assert torch.equal(first, lazy(unpatched(model, key).clone()))
    assert torch.equal(first, loaded(apply(model, [(one, 1.0)])[0])[key])


def test_a_weight_that_does_not_fit_is_decomposed_once(loras, monkeypatch):
    model, other = small_model(seed=13), small_model(seed=14)
    patched = through_core(other, loras, sketched(model, "svd"))[0]
    key = next(iter(attention_weights(model).values()))
    lazy = LowVramPatch(key, patched.patches)
    first = lazy(unpatched(other, key).clone())
    monkeypatch.setattr(stock, "decompose_all", None)
    assert torch.equal(first, lazy(unpatched(other, key).clone()))


def test_bypass_turns_the_inputs(loras):
    model = small_model()
    one = adapter(model, decomposition="none")
    save(one, loras / "one.safetensors")
    with torch.inference_mode():
        (bypass,) = LoraLoaderBypassModelOnly().load_lora_model_only(model, "one.safetensors", 0.7)
    merged = apply(model, [(one, 0.7)])[0]
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma, context = torch.tensor([3.0]), conditioning()[0][0]

    def output(patcher):
        load(patcher)
        with torch.inference_mode():
            patcher.inject_model()
            try:
                return patcher.model.apply_model(x, sigma, c_crossattn=context)
            finally:
                patcher.eject_model()

    plain = output(model)
    assert torch.allclose(output(bypass), output(merged), atol=1e-4)
    assert not torch.allclose(output(bypass), plain, atol=1e-2)


def test_bypass_refuses_what_it_cannot_turn(loras):
    model = small_model()
    one = adapter(model, decomposition="qr")
    save(one, loras / "one.safetensors")
    (bypass,) = LoraLoaderBypassModelOnly().load_lora_model_only(model, "one.safetensors", 1.0)
    load(bypass)
    with torch.inference_mode(), pytest.raises(SodaMixError, match="SODA Loader"):
        bypass.inject_model()
        try:
            bypass.model.apply_model(torch.zeros(1, 4, 8, 8), torch.tensor([1.0]), c_crossattn=conditioning()[0][0])
        finally:
            bypass.eject_model()


def test_loras_are_still_loras():
    up, down = torch.randn(8, 2), torch.randn(2, 8)
    tensors = {"diffusion_model.x.lora_up.weight": up, "diffusion_model.x.lora_down.weight": down}
    patches = load_lora(tensors, {"diffusion_model.x": "diffusion_model.x.weight"})
    assert isinstance(patches["diffusion_model.x.weight"], comfy.weight_adapter.LoRAAdapter)
    assert stock.StockAdapter.load("diffusion_model.x", {}, 1.0, None) is None  # as core's trainer asks


def test_a_damaged_layer_is_named():
    tensors = {"diffusion_model.x.soda_log_R0": torch.zeros(2)}
    with pytest.raises(SodaFileError, match="diffusion_model.x"):
        stock.StockAdapter.load("diffusion_model.x", tensors, None, None)


def test_core_trains_a_lora_with_the_class_registered():
    model = small_model()
    model.cached_patcher_init = (lambda disable_dynamic=False: small_model(), ())
    with torch.inference_mode():
        result = TrainLoraNode.execute(
            [model], [latents(1)], [conditioning()], [1], [1], [1], [1e-3], [2], ["AdamW"], ["MSE"], [0], ["fp32"],
            ["fp32"], [False], ["LoRA"], [False], [1], [False], ["[None]"], [False], [False],
        )  # fmt: skip
    trained = result.args[0]
    assert any(key.endswith("lora_up.weight") for key in trained)
