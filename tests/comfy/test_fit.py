"""What is said and done when the base is not the one the adapter was trained on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_models import adapter, load, small_model, weights
from soda_pack.soda.adapter import Adapter
from soda_pack.soda.decomposition import decompose, spectral_change
from soda_pack.soda.fingerprint import sketch
from soda_pack.soda.fit import rotation_only
from soda_pack.soda.hosts.comfy.patch import apply
from soda_pack.soda.hosts.comfy.targets import attention_weights


def sketched(model, decomposition):
    """An adapter with the sketches of its spectrum changes on `model`."""
    plain = adapter(model, decomposition=decomposition, name="mine")
    base = weights(model)
    layers = {}
    for layer, key in attention_weights(model).items():
        (term,) = plain.layers[layer]
        change = spectral_change(decompose(base[key], decomposition), term.delta, base[key])
        layers[layer] = (dataclasses.replace(term, sketch=sketch(change)),)
    return Adapter(layers, {**plain.metadata, "soda.base_model": "some base"}, "mine")


def perturbed(model, amount):
    """The same model with noise of relative size `amount` on its attention weights."""
    other = small_model()
    generator = torch.Generator().manual_seed(9)
    with torch.inference_mode():
        for key in attention_weights(model).values():
            weight = other.model_state_dict()[key]
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise * (amount * weight.norm() / noise.norm()))
    return other


@pytest.mark.parametrize("decomposition", ["lq", "svd"])
def test_the_same_base_is_silent(decomposition):
    model = small_model()
    _, _, report = apply(model, [(sketched(model, decomposition), 1.0)])
    assert report.warnings == []


def test_a_somewhat_other_base_is_told():
    model = small_model()
    _, _, report = apply(perturbed(model, 0.02), [(sketched(model, "lq"), 1.0)])
    assert len(report.warnings) == 1 and "mine was trained on other weights (some base)" in report.warnings[0]
    assert "only its rotation" not in report.warnings[0]


def test_on_a_far_base_only_the_rotation_is_applied():
    model = small_model()
    one = sketched(model, "svd")
    far = perturbed(model, 0.3)
    patched, _, report = apply(far, [(one, 1.0)])
    assert len(report.warnings) == 1 and "only its rotation is applied" in report.warnings[0]
    load(patched)
    after = weights(patched)
    turned = Adapter(rotation_only(one.layers), {}, "turned")
    load(far)
    expected, _, _ = apply(far, [(turned, 1.0)])
    load(expected)
    assert all(torch.allclose(after[k], v, atol=1e-6) for k, v in weights(expected).items())
    base = weights(small_model())
    assert not torch.allclose(after[next(iter(attention_weights(model).values()))],
                              base[next(iter(attention_weights(model).values()))], atol=1e-3)  # fmt: skip
