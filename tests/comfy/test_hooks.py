"""SODA files in core's hook nodes, on a schedule, beside adapters that are on the model itself."""

from __future__ import annotations

import comfy.utils
import pytest
import torch
from comfy_extras.nodes_hooks import CreateHookKeyframe, CreateHookLora, PairConditioningSetProperties, SetHookKeyframes
from small_models import adapter, conditioning, latents, load, lora, same, small_model, weights
from soda_pack.soda.file import save
from soda_pack.soda.hosts.comfy.patch import apply

import nodes as comfy_nodes

pytestmark = pytest.mark.usefixtures("loras")


def hook(folder, one, strength=1.0, keyframes=()):
    """HOOKS of an adapter's file; keyframes are (strength, start in percent)."""
    save(one, folder / "one.safetensors")
    (hooks,) = CreateHookLora().create_hook("one.safetensors", strength, strength)
    schedule = None
    for value, start in keyframes:
        (schedule,) = CreateHookKeyframe().create_hook_keyframe(value, start, schedule)
    return SetHookKeyframes().set_hook_keyframes(hooks, schedule)[0]


def sampled(model, hooks=None, steps=4):
    with torch.inference_mode():
        positive, negative = conditioning(), conditioning(seed=9)
        if hooks is not None:
            positive, negative = PairConditioningSetProperties().set_properties(
                positive, negative, 1.0, "default", hooks=hooks
            )
        (latent,) = comfy_nodes.common_ksampler(model, 0, steps, 2.0, "euler", "normal", positive, negative, latents(1))
    return latent["samples"]


def near(a, b, scale):
    return (a - b).norm() < 1e-4 * (b - scale).norm()


@pytest.mark.parametrize("decomposition", ["lq", "svd", "qr", "none"])
def test_a_hook_is_the_loader(loras, decomposition):
    model = small_model()
    one = adapter(model, decomposition=decomposition)
    load(model)
    before, base = weights(model), sampled(model)
    assert near(sampled(model, hook(loras, one, 0.7)), sampled(apply(model, [(one, 0.7)])[0]), base)
    load(model)
    assert torch.equal(sampled(model), base) and same(weights(model), before)


def test_a_schedule(loras):
    model = small_model()
    one = adapter(model)
    load(model)
    before, base = weights(model), sampled(model)
    full = sampled(model, hook(loras, one))
    assert near(sampled(model, hook(loras, one, 1.0, [(1.0, 0.0), (1.0, 0.5)])), full, base)
    half = sampled(model, hook(loras, one, 1.0, [(1.0, 0.0), (0.0, 0.5)]))
    assert not near(half, full, base) and (half - base).norm() > 1e-3
    assert torch.equal(sampled(model), base) and same(weights(model), before)


def test_behind_loras_all_of_the_file_applies(loras):
    """A hook's weights come last, and yet the spectrum and the rotation are those of the untouched weight."""
    model = small_model()
    one = adapter(model, decomposition="svd")
    patched = model.clone()
    patched.add_patches(lora(model), 30.0)
    both = apply(patched, [(one, 1.0)])[0]
    assert near(sampled(patched, hook(loras, one)), sampled(both), sampled(patched))


def test_beside_an_adapter_on_the_model_its_difference_is_added(loras):
    model = small_model()
    one, two = adapter(model, 1, name="one"), adapter(model, 5, name="two")
    static = apply(model, [(two, 1.0)])[0]
    load(model)
    base = weights(model)
    load(apply(model, [(one, 1.0)])[0])
    difference = {key: ("diff", (weight - base[key],)) for key, weight in weights(model).items() if weight.dim() == 2}
    expected = static.clone()
    expected.add_patches({key: value for key, value in difference.items() if value[1][0].count_nonzero()})
    assert near(sampled(static, hook(loras, one)), sampled(expected), sampled(static))


def test_a_lora_hook_on_a_bypassed_model(loras):
    model = small_model()
    one = adapter(model)
    merged, beside = (apply(model, [(one, 1.0)], mode=mode)[0] for mode in ("merge", "bypass"))
    tensors = {}
    for key, patch in lora(model).items():
        tensors[key.removesuffix(".weight") + ".lora_up.weight"] = patch.weights[0]
        tensors[key.removesuffix(".weight") + ".lora_down.weight"] = patch.weights[1]
    comfy.utils.save_torch_file(tensors, str(loras / "plain.safetensors"))
    (hooks,) = CreateHookLora().create_hook("plain.safetensors", 1.0, 1.0)
    assert near(sampled(beside, hooks), sampled(merged, hooks), sampled(merged))
