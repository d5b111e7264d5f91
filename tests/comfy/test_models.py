"""Every class of ComfyUI's own list of models: which projections are found in it, and the round trip of an adapter."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import comfy.sample
import comfy.supported_models
import comfy.utils
import model_zoo
import pytest
import torch
from small_models import adapter, load, same, weights
from soda_pack.soda.adapt import adapt
from soda_pack.soda.adapter import Adapter
from soda_pack.soda.decomposition import decompose
from soda_pack.soda.errors import SodaTrainingError
from soda_pack.soda.file import load as load_file
from soda_pack.soda.file import save
from soda_pack.soda.hosts.comfy import dataset
from soda_pack.soda.hosts.comfy.attention import projections
from soda_pack.soda.hosts.comfy.base import shapes, split_name
from soda_pack.soda.hosts.comfy.patch import apply
from soda_pack.soda.hosts.comfy.progress import TrainingProgress
from soda_pack.soda.hosts.comfy.targets import attention_weights
from soda_pack.soda.hosts.comfy.task import Task
from soda_pack.soda.hosts.comfy.train import train_adapter
from soda_pack.soda.training.settings import TrainingSettings

CLASSES = [kind.__name__ for kind in comfy.supported_models.models]
TABLE = Path(__file__).with_name("projections.txt")
VOXELS = "samples numbers at the points of a shape that an earlier model found, not a latent"
ONE_SIZE = "comes in one size alone, of 2 billion numbers"
DETECTOR = "finds or measures things in pictures: there is nothing to sample and nothing to train with noise"
UNTRAINED = {
    "Trellis2": VOXELS, "MiniMaxMusic3": ONE_SIZE,
    "RT_DETR_v4": DETECTOR, "SAM3": DETECTOR, "SAM31": DETECTOR, "DepthAnything3": DETECTOR,
}  # fmt: skip
APPLIED = [name for name in CLASSES if UNTRAINED.get(name) == VOXELS]
WIDE = ("Anima", "ACEStep")  # parts of 1024 wide at any size: without a decomposition they take seconds, not minutes


def found(name: str) -> str:
    """A line of the table: class, count, how many of them are cross-attention, count x shape ..."""
    device = torch.device("cpu" if name == "ACEStep15" else "meta")  # this one computes numbers when it is made
    model = model_zoo.build(name, device)
    known = shapes(model)
    sizes: Counter = Counter()
    for layer, key in attention_weights(model).items():
        rows = split_name(layer)[1]
        sizes[(known[key][0] if rows is None else rows[1] - rows[0], known[key][1])] += 1
    try:
        cross = str(len(attention_weights(model, "cross-attention")))
    except SodaTrainingError:
        cross = "-"
    shaped = "  ".join(f"{count} x {out}x{width}" for (out, width), count in sorted(sizes.items()))
    return f"{name:27} {sum(sizes.values()):4} {cross:>4}  {shaped}"


def test_every_class_has_an_entry():
    """Of the ComfyUI at hand; the table may know models of other versions too."""
    assert set(CLASSES) <= set(model_zoo.SMALL)
    listed = [line.split()[0] for line in TABLE.read_text().splitlines()[1:]]
    assert set(listed) == set(model_zoo.SMALL) and [name for name in listed if name in CLASSES] == CLASSES


@pytest.mark.parametrize("name", CLASSES)
def test_projections(name):
    """The table lists what is found; look at the names before changing a line of it."""
    line = found(name)
    assert int(line.split()[1]) > 0
    assert line in TABLE.read_text().splitlines()


@pytest.mark.parametrize("name", CLASSES)
def test_rows_of_a_fused_weight_neither_overlap_nor_leave_it(name):
    model = model_zoo.build(name, torch.device("cpu" if name == "ACEStep15" else "meta"))
    known = shapes(model)
    rows: dict[str, list] = {}
    for layer, key in attention_weights(model).items():
        rows.setdefault(key, []).append(split_name(layer)[1])
    for key, pieces in rows.items():
        if pieces == [None]:
            continue
        ends = [0, *(end for piece in pieces for end in piece)]
        assert all(start == end for start, end in zip(ends[1::2], ends[0:-1:2], strict=True)), (key, pieces)
        assert ends[-1] == known[key][0] or key.endswith(".linear1.weight")


def sample(model, name):
    """One step of Euler from an empty latent."""
    condition, channels = model_zoo.conditioning(name), model.model.latent_format.latent_channels
    with torch.inference_mode():
        empty = model_zoo.latents(name, model, 1)["samples"] * 0.0
        if not empty.is_nested:
            empty = torch.zeros(1, channels, *empty.shape[2:])
        noise = comfy.sample.prepare_noise(empty, 3)
        found = comfy.sample.sample(model, noise, 1, 1.0, "euler", "simple", condition, condition, empty, seed=1)
        return comfy.utils.pack_latents(found.unbind())[0] if found.is_nested else found


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in UNTRAINED])
def test_train_save_load_patch_sample_unpatch(name, tmp_path):
    model = model_zoo.build(name)
    before = weights(model)
    samples = dataset.collect([model_zoo.latents(name, model)], [model_zoo.conditioning(name)])
    dataset.must_fit(samples, model)
    decomposition = "none" if name in WIDE else "lq"
    settings = TrainingSettings(steps=2, learning_rate=0.01, batch_size=1, seed=0)
    with torch.inference_mode():
        trained, losses = train_adapter(Task(model, samples, settings, decomposition, 2), TrainingProgress(2, None))
    load(model)
    assert same(before, weights(model)) and not model.injections
    assert set(trained.layers) == set(attention_weights(model)) and all(loss == loss for loss in losses)
    assert any(not term.is_zero() for terms in trained.layers.values() for term in terms)
    save(trained, tmp_path / "x.safetensors")
    patched, _, report = apply(model, [(load_file(tmp_path / "x.safetensors"), 1.0)])
    assert report.changed == len(trained.layers) and not report.unmatched and not report.warnings
    there = sample(patched, name)
    assert there.isfinite().all() and not torch.equal(there, sample(model, name))
    load(patched)
    assert not same(before, weights(patched))
    load(model)
    assert same(before, weights(model))


if APPLIED:  # none on ComfyUI 0.30

    @pytest.mark.parametrize("name", APPLIED)
    def test_models_that_are_not_trained_are_patched(name):
        model = model_zoo.build(name)
        before = weights(model)
        patched, _, report = apply(model, [(adapter(model), 1.0)])
        load(patched)
        after = weights(patched)
        changed = {split_name(layer)[0] for layer in attention_weights(model)}
        assert {key for key in before if not torch.equal(before[key], after[key])} == changed and report.changed
        load(model)
        assert same(before, weights(model))


@pytest.mark.parametrize("plan", ["frugal", "low VRAM"])
def test_keys_of_a_prompt_are_not_met_again_under_other_weights(plan):
    """HiDream-O1 keeps them from step to step and knows them by the prompt alone."""
    model = model_zoo.build("HiDreamO1")
    patched, _, _ = apply(model, [(adapter(model), 1.0)])
    base, there = sample(model, "HiDreamO1"), sample(patched, "HiDreamO1")
    assert not torch.equal(base, there) and torch.equal(base, sample(model, "HiDreamO1"))
    settings = TrainingSettings(steps=2, learning_rate=0.01, batch_size=1, loss="dco", beta=10.0)
    samples = dataset.collect([model_zoo.latents("HiDreamO1", model)], [model_zoo.conditioning("HiDreamO1")])
    with torch.inference_mode():
        train_adapter(Task(model, samples, settings, "lq", 2), TrainingProgress(2, None), memory=plan)
    assert torch.equal(base, sample(model, "HiDreamO1"))
    assert torch.equal(there, sample(patched, "HiDreamO1"))


def test_a_single_stream_block_keeps_its_mlp():
    model = model_zoo.build("Flux")
    layers = [layer for layer in attention_weights(model) if "linear1" in layer]
    assert [layer.rsplit(".", 1)[1] for layer in layers] == ["linear1[0:48]", "linear1[48:96]", "linear1[96:144]"]
    key = split_name(layers[0])[0]
    before = weights(model)[key]
    patched, _, _ = apply(model, [(adapter(model), 1.0)])
    load(patched)
    after = weights(patched)[key]
    assert torch.equal(after[144:], before[144:])
    assert not any(torch.allclose(after[i : i + 48], before[i : i + 48], atol=1e-3) for i in (0, 48, 96))


def test_a_1x1_convolution_is_adapted_as_a_matrix():
    model = model_zoo.build("SD15")
    key = "diffusion_model.middle_block.1.proj_in.weight"
    before = weights(model)[key]
    assert before.shape[2:] == (1, 1)
    layer = next(terms for terms in adapter(model, decomposition="lq").layers.values() if terms[0].dimension == 64)
    patched, _, report = apply(model, [(Adapter({key.removesuffix(".weight"): layer}), 1.0)])
    load(patched)
    after = weights(patched)[key]
    matrix = before.flatten(1)
    expected = adapt(matrix, layer, {"lq": decompose(matrix, "lq").kept()})
    assert after.shape == before.shape and torch.allclose(after.flatten(1), expected, atol=1e-6)
    assert report.changed == 1 and not torch.allclose(after, before, atol=1e-3)


def test_attention_of_1x1_convolutions_is_found():
    q = {f"diffusion_model.mid.attn_1.{part}.weight": (64, 64, 1, 1) for part in ("q", "k", "v", "proj_out")}
    others = {"diffusion_model.mid.conv.weight": (64, 64, 3, 3), "diffusion_model.mid.attn_1.norm.weight": (64,)}
    assert list(projections({**q, **others})) == [key.removesuffix(".weight") for key in q]


def test_queries_alone_are_no_attention():
    assert not projections({"diffusion_model.a.q.weight": (8, 8), "diffusion_model.a.out.weight": (8, 8)})
