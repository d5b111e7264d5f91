"""Memory plans of SODA Train on real networks: the same adapter, less kept, the next plan where memory ends."""

from __future__ import annotations

from collections import Counter

import comfy.model_management
import comfy.supported_models
import model_zoo
import pytest
import torch
from small_models import adapter, lora, small_model, weights
from soda_pack.soda.errors import SodaTrainingError
from soda_pack.soda.hosts.comfy import dataset, differentiable, train
from soda_pack.soda.hosts.comfy.blocks import blocks
from soda_pack.soda.hosts.comfy.memory import Memory
from soda_pack.soda.hosts.comfy.patch import apply
from soda_pack.soda.hosts.comfy.targets import attention_weights
from soda_pack.soda.training.plan import PLANS, choose
from soda_pack.soda.training.run import TrainingRun
from soda_pack.soda.training.settings import TrainingSettings
from torch.autograd.graph import saved_tensors_hooks
from training import Watcher, data, kept, run, untouched

DETECTORS = ("RT_DETR_v4", "SAM3", "SAM31", "DepthAnything3")
CLASSES = [kind.__name__ for kind in comfy.supported_models.models if kind.__name__ not in DETECTORS]
NETWORKS = ("UNet", "Flux", "SD3")
# Attentions that pool a text into one vector stand alone, outside any list.
ALONE = {"HunyuanDiT": 3, "HunyuanDiT1": 3, "GenmoMochi": 3}


def network(name):
    """(a model, samples for it): a UNet, or a transformer from ComfyUI's list."""
    if name == "UNet":
        return small_model(), data()
    model = model_zoo.build(name)
    return model, dataset.collect([model_zoo.latents(name, model)], [model_zoo.conditioning(name)])


def alike(one, other, tolerance=1e-4):
    for name, (layer,) in one.layers.items():
        (same,) = other.layers[name]
        for a, b in zip((layer.delta, layer.sketch, *layer.logs), (same.delta, same.sketch, *same.logs), strict=True):
            assert a is None and b is None or torch.allclose(a, b, atol=tolerance), name
    return one.layers.keys() == other.layers.keys()


@pytest.mark.parametrize("decomposition", ["lq", "svd"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_plan_gives_the_same_adapter(name, decomposition):
    """Flux and its like write into their residual streams in place: see `recompute`."""
    model, samples = network(name)
    before, found = weights(model), {}
    for plan in PLANS:
        found[plan] = run(model, steps=3, samples=samples, memory=plan, decomposition=decomposition, rate=0.01)
        assert untouched(model, before)
        assert not any("forward" in module.__dict__ for module in model.model.modules())
    one, losses = found["fast"]
    for plan in PLANS[1:]:
        assert found[plan][1] == pytest.approx(losses, rel=1e-5)
        assert alike(found[plan][0], one)


def test_the_first_gradient_is_equal_to_rounding(monkeypatch):
    runs = []

    def watched(*args):
        runs.append(TrainingRun(*args))
        return runs[-1]

    monkeypatch.setattr(train, "TrainingRun", watched)
    seen = {}
    for plan in PLANS:
        run(small_model(), steps=1, memory=plan)
        seen[plan] = [p.grad for p in runs[-1].trained]
    for plan in PLANS[1:]:
        for a, b in zip(seen[plan], seen["fast"], strict=True):
            assert b.norm() > 0 and (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("plan", PLANS[1:])
def test_with_a_lora_an_adapter_and_dco_a_plan_changes_nothing(plan):
    model = small_model()
    patched = apply(model, [(adapter(model, 5, 0.3), 0.7)])[0]
    patched.add_patches(lora(model), 2.0)
    before = weights(model)
    found = [run(patched, steps=3, memory=memory, loss="dco") for memory in ("fast", plan)]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4) and alike(found[0][0], found[1][0])
    assert untouched(model, before)


def test_the_frugal_plan_keeps_a_fraction_for_the_backward_pass():
    """Bytes saved by autograd outside of the blocks, at a size where activations outweigh weights."""
    model, samples = small_model(), dataset.collect([model_zoo.latents("SD15", model_zoo.build("SD15"))], [CAPTION])
    found = {}
    for plan in ("fast", "frugal"):
        sizes = Counter()

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            run(model, steps=1, samples=samples, memory=plan)
        found[plan] = sum(sizes.values())
    assert found["frugal"] < 0.35 * found["fast"]


CAPTION = model_zoo.conditioning("SD15")


@pytest.mark.parametrize("name", CLASSES)
def test_every_adapted_weight_lies_in_a_block(name):
    model = model_zoo.build(name, torch.device("cpu" if name == "ACEStep15" else "meta"))
    paths = [key.removesuffix(".weight") for key in attention_weights(model).values()]
    found = blocks(model.model, paths)
    outside = {path for path in paths if not any(path.startswith(f"{block}.") for block in found)}
    assert len(outside) == ALONE.get(name, 0)
    assert not any(a != b and a.startswith(f"{b}.") for a in found for b in found)


def test_a_unets_resblocks_are_blocks_without_attention_too():
    model = model_zoo.build("SD_X4Upscaler", torch.device("meta"))
    paths = [key.removesuffix(".weight") for key in attention_weights(model).values()]
    assert {type(block).__name__ for block in blocks(model.model, paths).values()} == {
        "ResBlock", "BasicTransformerBlock"
    }  # fmt: skip


def test_the_plan_is_the_fastest_that_fits():
    model = small_model()
    budget = Memory.of({model: attention_weights(model)}, data(), (), TrainingSettings(batch_size=1), "lq")
    needed = budget.needed
    assert needed["fast"] > needed["frugal"] > needed["low VRAM"] > 0
    for plan in PLANS:
        assert choose(needed, needed[plan]) == plan and budget.plan(plan) == plan
    assert choose(needed, 0) == "low VRAM" and budget.plan("auto") == "fast"
    more = Memory.of({model: attention_weights(model)}, data(), data(), TrainingSettings(batch_size=4), "svd")
    assert all(more.needed[plan] > needed[plan] for plan in PLANS)


def test_a_plan_that_is_not_the_fast_one_is_told():
    watcher = Watcher(1)
    run(small_model(), steps=1, progress=watcher, memory="frugal")
    (note,) = watcher.notes
    assert note.startswith("Memory plan: frugal, about ") and note.endswith(" GB free.")


def out_of_memory(watcher, plans, at):
    """Memory ends at a step, as often as `plans` says."""
    left = [plans]

    def step(step):
        if step == at and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")

    watcher.at = step
    return watcher


def test_where_memory_ends_the_next_plan_goes_on_from_the_last_step(output):
    model, (expected, losses) = small_model(), kept(small_model(), steps=7, reuse=False)
    before, watcher = weights(model), Watcher(7)
    one, again = kept(model, steps=7, reuse=False, progress=out_of_memory(watcher, 1, 3))
    assert watcher.notes[0] == "The memory was not enough for the plan fast."
    assert watcher.notes[1].startswith("Memory plan: frugal")
    assert "Went on from step 4" in watcher.notes[2] and watcher.seen == list(range(7))
    assert again == pytest.approx(losses, rel=1e-5) and alike(one, expected) and untouched(model, before)


def test_where_all_plans_end_the_error_says_what_to_lower():
    model = small_model()
    before, watcher = weights(model), Watcher(4)
    with pytest.raises(SodaTrainingError, match="is not enough for batches of 2 at latent size 8x8.*Lower batch_size"):
        run(model, steps=4, progress=out_of_memory(watcher, 3, 1))
    assert len([note for note in watcher.notes if "was not enough" in note]) == 2 and untouched(model, before)


def test_offloaded_weights_are_copied_before_anything_is_saved(monkeypatch):
    """What ComfyUI streams lies in buffers that the next module's weights overwrite. Here every cast goes through two
    such buffers in turn, and the model claims to lie elsewhere, so that this is seen without a GPU."""
    model, samples = small_model(), data()
    expected, losses = run(model, steps=2, samples=samples)
    buffers, calls = [torch.empty(1 << 20), torch.empty(1 << 20)], []

    def cast(weight, *args, **kwargs):
        if not isinstance(weight, torch.nn.Parameter):
            return plain_cast(weight, *args, **kwargs)
        calls.append(weight.shape)
        return buffers[len(calls) % 2][: weight.numel()].view(weight.shape).copy_(weight)

    plain_cast, plain = comfy.model_management.cast_to, train.Injection._inject

    def inject(self, patcher):
        device, patcher.load_device = patcher.load_device, torch.device("meta")  # every weight lies elsewhere
        try:
            plain(self, patcher)
        finally:
            patcher.load_device = device

    for module in model.model.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
    monkeypatch.setattr(differentiable, "copying", None)  # nor is any of it left to the second try with copies of all
    monkeypatch.setattr(train.Injection, "_inject", inject)
    monkeypatch.setattr(comfy.model_management, "cast_to", cast)
    one, again = run(model, steps=2, samples=samples, memory="low VRAM")
    assert calls and again == pytest.approx(losses, rel=1e-5) and alike(one, expected)
