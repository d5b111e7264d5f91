"""Adapters on a real ModelPatcher: bit-exact returns, folding, LoRA, strengths, misfits."""

from __future__ import annotations

import pytest
import torch
from comfy.weight_adapter import WeightAdapterBase
from small_models import CONTEXT, adapter, load, lora, same, small_clip, small_model, weights
from soda_pack.soda.adapt import adapt
from soda_pack.soda.adapter import Adapter, Layer
from soda_pack.soda.decomposition import decompose
from soda_pack.soda.errors import SodaMixError
from soda_pack.soda.hosts.comfy.base import unpatched
from soda_pack.soda.hosts.comfy.patch import SodaWeightAdapter, apply, attached
from soda_pack.soda.hosts.comfy.targets import attention_weights
from soda_pack.soda.mixing import mix


def loaded_weights(model):
    load(model)
    return weights(model)


def close(a, b, tolerance=2e-5):
    return all(torch.allclose(a[key], b[key], atol=tolerance) for key in a)


@pytest.mark.parametrize("decomposition", ["lq", "svd", "qr", "none"])
def test_weights_are_those_of_the_library(decomposition):
    model = small_model()
    one = adapter(model, decomposition=decomposition)
    base = weights(model)
    patched, _, report = apply(model, [(one, 0.7)])
    after = loaded_weights(patched)
    assert report.changed == len(one.layers) and not report.unmatched and not report.warnings
    assert all(patched.model.get_parameter(key).is_contiguous() for key in attention_weights(model).values())
    for layer, key in attention_weights(model).items():
        bases = {} if decomposition == "none" else {decomposition: decompose(base[key], decomposition)}
        expected = adapt(base[key], [term.scaled(0.7) for term in one.layers[layer]], bases)
        assert torch.allclose(after[key], expected, atol=1e-5)
        assert not torch.allclose(after[key], base[key], atol=1e-3)
    untouched = base.keys() - set(attention_weights(model).values())
    assert all(torch.equal(base[key], after[key]) for key in untouched)


def test_strength_zero_unpatch_and_requeue_are_bit_exact():
    model = small_model()
    base = weights(model)
    one = adapter(model)
    zero, _, _ = apply(model, [(one, 0.0)])
    assert same(base, loaded_weights(zero)) and not zero.patches
    patched, _, _ = apply(model, [(one, 1.0)])
    first = loaded_weights(patched)
    assert same(base, loaded_weights(model))
    assert same(first, loaded_weights(patched))
    again, _, _ = apply(model, [(one, 1.0)])
    assert same(first, loaded_weights(again))
    load(model)
    assert same(base, weights(model))


def test_bases_come_from_the_unpatched_weights():
    model = small_model()
    one = adapter(model)
    expected = loaded_weights(apply(model, [(one, 1.0)])[0])
    other = small_model()
    loaded = other.clone()
    loaded.add_patches(lora(other))
    load(loaded)
    key = next(iter(attention_weights(other).values()))
    assert not torch.equal(other.model_state_dict()[key], unpatched(loaded, key))
    assert same(expected, loaded_weights(apply(other, [(one, 1.0)])[0]))


def test_lora_before_and_after_give_the_same_weights():
    model = small_model()
    one = adapter(model)
    before = model.clone()
    before.add_patches(lora(model), 0.8)
    before, _, _ = apply(before, [(one, 1.0)])
    after, _, _ = apply(model, [(one, 1.0)])
    after = after.clone()
    after.add_patches(lora(model), 0.8)
    assert same(loaded_weights(before), loaded_weights(after))


def test_loaders_in_any_order_are_one_mix():
    model = small_model()
    a, b = adapter(model, 1, name="a"), adapter(model, 5, name="b")
    ab = apply(apply(model, [(a, 0.6)])[0], [(b, -0.4)])[0]
    ba = apply(apply(model, [(b, -0.4)])[0], [(a, 0.6)])[0]
    both = apply(model, [(a, 0.6), (b, -0.4)])[0]
    mixed = apply(model, [(mix([(a, 0.6), (b, -0.4)]), 1.0)])[0]
    reference = loaded_weights(both)
    assert same(reference, loaded_weights(ab)) and same(reference, loaded_weights(ba))
    assert close(reference, loaded_weights(mixed))
    soda = [e for entries in ab.patches.values() for e in entries if isinstance(e[1], SodaWeightAdapter)]
    assert len(soda) == len(a.layers) == len(ab.patches)
    assert len(attached(ab)) == 2 and not attached(model)


@pytest.mark.parametrize("strength", [-1.0, 0.5, 2.5])
def test_other_strengths_keep_the_singular_values_of_a_rotation(strength):
    model = small_model()
    base = weights(model)
    after = loaded_weights(apply(model, [(adapter(model, decomposition="none"), strength)])[0])
    for key in attention_weights(model).values():
        assert torch.allclose(torch.linalg.svdvals(base[key]), torch.linalg.svdvals(after[key]), atol=1e-4)
        assert not torch.allclose(base[key], after[key], atol=1e-2)


def test_minus_undoes_a_rotation():
    model = small_model()
    base = weights(model)
    one = adapter(model, decomposition="none")
    assert close(base, loaded_weights(apply(apply(model, [(one, 1.0)])[0], [(one, -1.0)])[0]), 1e-6)


def test_core_rebuilds_the_patch_from_keys_and_weights():
    model = small_model()
    patched, _, _ = apply(model, [(adapter(model), 1.0)])
    key, entries = next(iter(patched.patches.items()))
    original = entries[0][1]
    rebuilt = type(original)(original.loaded_keys, original.weights)
    assert isinstance(rebuilt, WeightAdapterBase)
    base = model.model_state_dict()[key]
    one = original.calculate_weight(base.clone(), key, 0.5, 1.0, None, None)
    two = rebuilt.calculate_weight(base.clone(), key, 0.5, 1.0, None, None)
    assert torch.equal(one, two) and not torch.equal(one, base)


def test_rows_of_a_fused_weight_are_written_in_place():
    model = small_model()
    layer, key = next(iter(attention_weights(model).items()))
    base = weights(model)[key]
    half = base.shape[0] // 2
    terms = adapter(model, decomposition="none").layers[layer]
    part = Adapter({f"{layer}[{half}:{base.shape[0]}]": terms}, {}, "rows")
    after = loaded_weights(apply(model, [(part, 1.0)])[0])[key]
    assert torch.equal(after[:half], base[:half])
    assert torch.allclose(after[half:], adapt(base[half:], terms, {}), atol=1e-6)
    assert not torch.allclose(after[half:], base[half:], atol=1e-3)


def test_low_vram_computes_the_same_weight():
    model = small_model()
    patched, _, _ = apply(model, [(adapter(model), 1.0)])
    patched.add_patches(lora(model))
    expected = loaded_weights(patched)
    load(model)
    key = next(iter(attention_weights(model).values()))
    from comfy.model_patcher import LowVramPatch

    lazy = LowVramPatch(key, patched.patches)
    assert lazy.memory_required() >= 0
    assert torch.allclose(lazy(unpatched(model, key).clone()), expected[key], atol=1e-6)


def test_half_precision_models():
    model = small_model(dtype=torch.float16)
    base = weights(model)
    after = loaded_weights(apply(model, [(adapter(model), 1.0)])[0])
    key = next(iter(attention_weights(model).values()))
    assert after[key].dtype == torch.float16 and not torch.equal(after[key], base[key])
    assert same(base, loaded_weights(model))


def test_an_adapter_of_another_architecture_is_refused():
    model = small_model()
    base = weights(model)
    wide = adapter(small_model(width=64), name="wide")
    with pytest.raises(SodaMixError, match=r"'wide' does not fit.* of its 56 layers.*width 64.*\(32, 32\)"):
        apply(model, [(wide, 1.0)])
    assert same(base, weights(model)) and not model.patches
    elsewhere = Adapter({f"transformer.{name}": terms for name, terms in wide.layers.items()}, {}, "elsewhere")
    with pytest.raises(SodaMixError, match="'elsewhere' does not fit.*none of its 56 layers"):
        apply(model, [(elsewhere, 1.0)])


def test_keys_that_do_not_match_are_reported():
    model = small_model()
    one = adapter(model)
    terms = next(iter(one.layers.values()))
    odd = Adapter({**one.layers, "diffusion_model.nowhere.to_q": terms}, {}, "odd")
    _, _, report = apply(model, [(odd, 1.0)])
    assert report.unmatched == ["diffusion_model.nowhere.to_q"]
    assert "1 keys did not match: diffusion_model.nowhere.to_q" in report.text()


def test_layers_of_the_text_encoder_go_to_the_clip():
    model, clip = small_model(), small_clip()
    base, text = weights(model), weights(clip.patcher)
    layer = "clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj"
    both = Adapter(
        {**adapter(model).layers, layer: (Layer("none", None, (torch.ones(CONTEXT * 47 // 2),)),)}, {}, "both"
    )
    patched, new_clip, report = apply(model, [(both, 1.0)], clip)
    assert report.changed == len(both.layers) and not report.unmatched
    load(new_clip.patcher)
    after = weights(new_clip.patcher)
    assert [key for key in text if not torch.equal(text[key], after[key])] == [f"{layer}.weight"]
    load(patched)
    assert not same(base, weights(patched))
    load(clip.patcher)
    assert same(text, weights(clip.patcher))
    _, nothing, report = apply(model, [(both, 1.0)])
    assert nothing is None and report.unmatched == [layer] and report.changed == len(both.layers) - 1
