"""Adapters on the text encoders: CLIP and T5, with a strength of their own, by SODA Loader and by Load LoRA."""

from __future__ import annotations

import re

import pytest
import torch
from comfy.lora import load_lora, model_lora_keys_clip
from small_models import adapter, load, same, small_clip, small_model, small_t5, weights
from soda_pack.nodes.loader import SodaLoader
from soda_pack.soda.adapter import Adapter, Layer
from soda_pack.soda.file import save
from soda_pack.soda.hosts.comfy import folders, stock
from soda_pack.soda.hosts.comfy.patch import apply
from soda_pack.soda.kronecker import factor_sizes
from test_nodes import run

ENCODERS = {"clip": (small_clip, r"self_attn\.(q|k|v|out)_proj$"), "t5": (small_t5, r"SelfAttention\.(q|k|v|o)$")}


@pytest.fixture(params=ENCODERS)
def encoder(request):
    """(a CLIP, an adapter for all of its attention projections)."""
    make, names = ENCODERS[request.param]
    clip = make()
    generator = torch.Generator().manual_seed(7)
    layers = {}
    for key, weight in clip.patcher.model_state_dict().items():
        path = key.removesuffix(".weight")
        if key.endswith(".weight") and re.search(names, path):
            logs = [torch.randn(n * (n - 1) // 2, generator=generator) for n in factor_sizes(weight.shape[1], 3)]
            delta = torch.randn(min(weight.shape), generator=generator) * 0.05
            layers[path] = (Layer("lq", delta, tuple(logs)),)
    assert len(layers) == 8
    return clip, Adapter(layers, {}, "words")


def said(clip):
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize("a red fox"))[0][0]


def test_an_adapter_changes_what_is_said_and_comes_off(encoder):
    clip, one = encoder
    model, before, base = small_model(), said(clip), weights(clip.patcher)
    new_model, new_clip, report = apply(model, [(one, 1.0)], clip)
    assert report.changed == 8 and not report.unmatched and not new_model.patches
    after = said(new_clip)
    assert after.isfinite().all() and not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(said(clip), before)
    assert same(weights(clip.patcher), base)


def test_the_strengths_of_model_and_text_encoder_are_two(encoder, output):
    clip, one = encoder
    model = small_model()
    both = Adapter({**one.layers, **adapter(model).layers}, {}, "both")
    folder = output / "loras" / "soda"
    folder.mkdir(parents=True)
    save(both, folder / "both.safetensors")
    assert "both.safetensors" in folders.adapter_names()
    there = run(SodaLoader, model=model, adapter_name="both.safetensors", strength=0.0, clip=clip, strength_clip=0.5)
    assert not there[0].patches and len(there[1].patcher.patches) == 8
    expected = apply(model, [(one, 0.5)], clip)[1]
    load(there[1].patcher)
    after = weights(there[1].patcher)
    load(expected.patcher)
    assert same(after, weights(expected.patcher))
    silent = run(SodaLoader, model=model, adapter_name="both.safetensors", strength=1.0, clip=clip, strength_clip=0.0)
    assert len(silent[0].patches) == len(adapter(model).layers) and not silent[1].patcher.patches


def test_load_lora_finds_them(encoder, output):
    clip, one = encoder
    stock.register()
    tensors = {f"{layer}.soda_lq": terms[0].delta for layer, terms in one.layers.items()}
    for layer, (term,) in one.layers.items():
        tensors |= {f"{layer}.soda_log_R{j}": log for j, log in enumerate(term.logs)}
    patches = load_lora(tensors, model_lora_keys_clip(clip.cond_stage_model, {}))
    assert len(patches) == 8
    stocked = clip.clone()
    stocked.add_patches(patches, 1.0)
    expected = apply(small_model(), [(one, 1.0)], clip)[1]
    load(stocked.patcher)
    after = weights(stocked.patcher)
    load(expected.patcher)
    assert same(after, weights(expected.patcher))
