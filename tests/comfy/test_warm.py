"""What a second application costs, counted: no decomposition, no file read, no fit check; and what the bounds keep."""

from __future__ import annotations

import gc
import json
import random
import weakref
from dataclasses import replace
from pathlib import Path

import folder_paths
import pytest
import torch
from comfy.lora import calculate_weight
from comfy.model_patcher import LowVramPatch
from comfy.quant_ops import QuantizedTensor
from quantised_models import GGUF, quantised_model
from small_models import adapter, load, lora, same, small_model, weights
from soda_pack.nodes.loader import SodaLoader
from soda_pack.soda import basis_cache, content, rotation
from soda_pack.soda.file import save
from soda_pack.soda.hosts.comfy import base, bypass, fit, fold, folders
from soda_pack.soda.hosts.comfy.base import CACHE, shapes
from soda_pack.soda.hosts.comfy.fold import FOLDS, Ready
from soda_pack.soda.hosts.comfy.patch import apply
from soda_pack.soda.hosts.comfy.targets import attention_weights
from test_fit import sketched
from training import run


@pytest.fixture(autouse=True)
def settings():
    """settings(memory=GB, disk=GB): what the user chose in the panel; the defaults again afterwards."""
    path = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def choose(memory=6.0, disk=8.0):
        path.write_text(json.dumps({"SODA.basesInMemory": memory, "SODA.basesOnDisk": disk, "Comfy.Other": "x"}))
        base.bounded_cache()

    yield choose
    path.unlink(missing_ok=True)
    base.bounded_cache()


@pytest.fixture
def counted(monkeypatch):
    """How often each costly thing was done, by name."""
    counts = {"decomposed": 0, "hashed": 0, "checked": 0, "read": 0, "expm": 0}

    def count(module, name, what):
        plain = getattr(module, name)

        def counting(*args, **kwargs):
            counts[what] += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    count(basis_cache, "decompose_batches", "decomposed")
    count(fold, "decompose_all", "decomposed")
    count(content, "_pieces", "hashed")
    count(fit, "spectrum_error", "checked")
    count(folders.file, "load", "read")
    count(rotation, "expm_factors", "expm")
    real = basis_cache.decompose_batches
    monkeypatch.setattr(
        basis_cache, "decompose_batches", lambda missing, *a, **k: real(missing, *a, **k) if missing else iter(())
    )
    return counts


def loader(model, name, strength):
    """The MODEL of SODA Loader, run as the server does."""
    cls = SodaLoader.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    return cls.execute(model, name, strength).result[0]


def near(one, two):
    return all(torch.allclose(one[key].float(), two[key].float(), atol=1e-4) for key in two)


def loaded(model):
    load(model)
    return weights(model)


@pytest.mark.parametrize("decomposition", ["lq", "svd"])
def test_a_new_strength_computes_nothing_again(output, counted, decomposition):
    model = small_model(seed=21)
    save(sketched(model, decomposition), Path(folders.next_save_path("one")))
    name = next(name for name in folders.adapter_names() if name.startswith("one"))
    with torch.inference_mode():
        first = loader(model, name, 1.0)
    cold = loaded(first)
    assert counted["decomposed"] and counted["hashed"] == 56 and counted["checked"] == counted["read"] == 1
    before = dict(counted)
    with torch.inference_mode():
        second = loader(model, name, 0.4)
        assert counted == before  # nor anything for the rotations, before a weight is met
        assert not same(cold, loaded(second))
        forms = counted["expm"] - before["expm"]
        assert 0 < forms <= 5  # batches of equal factor sizes, not the 56 layers
        again = loader(model, name, 1.0)
    assert same(cold, loaded(again))
    counted["expm"] = before["expm"]
    assert counted == before


@pytest.mark.parametrize("decomposition", ["lq", "svd"])
def test_bases_on_disk_are_not_computed_again(settings, counted, decomposition):
    """And where they turn out to be damaged, they are, and written anew."""
    model = small_model(seed=23)
    one = sketched(model, decomposition)
    expected = loaded(apply(model, [(one, 1.0)])[0])
    CACHE.flush()
    patched = None
    for damaged in (False, True):
        del patched  # what it shares with models of other strengths goes with it
        gc.collect()
        settings(memory=0.0)
        settings()
        decomposed, files = counted["decomposed"], set(CACHE._folder.path.glob("*.basis"))
        for file in files if damaged else ():
            file.write_bytes(file.read_bytes()[:-1] + b"x")
        patched, _, report = apply(model, [(one, 1.0)])
        assert report.changed == 56 and not report.warnings and same(loaded(patched), expected)
        assert counted["decomposed"] == decomposed + damaged
        assert all(basis.whole for basis in fold_of(patched).bases.values())
    CACHE.flush()
    del patched
    gc.collect()
    settings(memory=0.0)
    settings()
    assert same(loaded(apply(model, [(one, 1.0)])[0]), expected)
    assert counted["decomposed"] == decomposed + 1


@pytest.mark.parametrize("decomposition", ["lq", "svd"])
def test_a_training_finds_and_leaves_the_bases_that_applying_needs(counted, decomposition):
    model = small_model(seed=22)
    one, _ = run(model, steps=1, decomposition=decomposition)
    decomposed, hashed = counted["decomposed"], counted["hashed"]
    assert decomposed and hashed == 56
    patched, _, report = apply(model, [(one, 1.0)])
    assert report.changed == 56 and not report.warnings
    loaded(patched)
    two, _ = run(model, steps=1, decomposition=decomposition)
    assert (counted["decomposed"], counted["hashed"]) == (decomposed, hashed)
    assert all(
        torch.equal(a.delta, b.delta) for n in one.layers for a, b in zip(one.layers[n], two.layers[n], strict=True)
    )


@pytest.mark.parametrize("decomposition", ["lq", "none"])
@pytest.mark.parametrize("form", ["float8_e4m3fn", "nvfp4", GGUF])
def test_a_new_strength_unpacks_no_quantised_weight(monkeypatch, form, decomposition):
    model = quantised_model(form)
    apply(model, [(adapter(model, decomposition=decomposition), 1.0)])
    monkeypatch.setattr(base, "unpatched", None)
    second = apply(model, [(adapter(model, decomposition=decomposition), 0.5)])[0]
    monkeypatch.undo()
    assert bypass.installed(second)


def test_a_quantised_weight_that_changed_is_seen():
    model = quantised_model("float8_e4m3fn")
    layer, weight = next(
        (layer, weight)
        for layer, key in attention_weights(model).items()
        if isinstance(weight := model.model.get_parameter(key), QuantizedTensor)
    )
    seen = base.UnpatchedWeights({model: [layer]})
    before = base._samples(seen.stored())
    assert base._samples(seen.stored()) == before
    with torch.inference_mode():
        weight.params.scale.mul_(2)
    assert base._samples(seen.stored()) != before


def test_a_file_that_changes_is_read_again(output, counted):
    model = small_model()
    path = Path(folders.next_save_path("one"))
    save(adapter(model, 1), path)
    name = next(name for name in folders.adapter_names() if name.startswith("one"))
    one = folders.load(name)
    assert folders.load(name) is one and counted["read"] == 1
    save(adapter(model, 2), path)
    assert folders.load(name).content_hash != one.content_hash and counted["read"] == 2


def test_other_weights_are_checked_anew(counted):
    model, other = small_model(seed=22), small_model(seed=23)
    one = sketched(model, "svd")
    assert not apply(model, [(one, 1.0)])[2].warnings
    assert "only its rotation" in apply(other, [(one, 1.0)])[2].warnings[0]
    assert counted["checked"] == 2
    assert "only its rotation" in apply(other, [(one, 0.5)])[2].warnings[0]
    assert not apply(model, [(one, 0.5)])[2].warnings
    assert counted["checked"] == 2


def test_eight_adapters_in_any_order_are_the_same_bit_for_bit():
    model = small_model()
    parts = [(adapter(model, seed, name=str(seed)), 0.1 * seed - 0.35) for seed in range(1, 9)]
    reference = loaded(apply(model, parts)[0])
    for seed in range(3):
        shuffled = random.Random(seed).sample(parts, 8)
        assert same(reference, loaded(apply(model, shuffled)[0]))
        one_by_one = apply(apply(model, shuffled[:3])[0], shuffled[3:])[0]
        assert same(reference, loaded(one_by_one))


@pytest.mark.parametrize("decomposition", ["lq", "svd", "qr", "none"])
@pytest.mark.parametrize("memory", [6.0, 0.0])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float16, 0.01)])
def test_low_vram_repeats_the_same_weight_and_decomposes_no_more(settings, counted, decomposition, memory, dtype, near):
    settings(memory=memory, disk=0)
    model = small_model(seed=24, dtype=dtype)
    patched = apply(model, [(adapter(model, decomposition=decomposition), 1.0)])[0]
    patched.add_patches(lora(model))
    expected = loaded(patched)
    load(model)
    for key in list(attention_weights(model).values())[:3]:
        lazy, base_weight = LowVramPatch(key, patched.patches), weights(model)[key]
        first = lazy(base_weight.clone())
        before = dict(counted)
        assert all(torch.equal(first, lazy(base_weight.clone())) for _ in range(3)) and counted == before
        assert lazy.memory_required() > 0  # with dynamic VRAM core fails at nothing to pin
        assert (first - expected[key]).norm() <= near * (expected[key] - base_weight).norm()


def test_a_change_used_in_every_forward_is_kept_in_a_byte_a_number():
    """From the second time on; the first forward of a patch gives the same weight to the last bit."""
    model = small_model(seed=24, dtype=torch.bfloat16)
    patched = apply(model, [(adapter(model, 1, decomposition="svd"), 1.0), (adapter(model, 2), 0.5)])[0]
    key, base = next((key, weights(model)[key]) for key in patched.patches)
    fold, layer, _ = patched.patches[key][0][1].weights
    lazy = LowVramPatch(key, patched.patches)
    results = [lazy(base.clone()) for _ in range(2)]
    (((name, kind), kept),) = fold._changes.items()
    assert (name, kind) == (layer, torch.int8) and kept.data.nbytes <= 1.1 * base.numel()
    CACHE.flush()
    fold.bases.clear()  # no longer needed
    assert all(torch.equal(results[0], found) for found in (*results, lazy(base.clone())))


@pytest.mark.parametrize("forward", [False, True])
def test_vectors_are_sent_as_what_other_mixes_need_but_for_a_change_that_is_kept(monkeypatch, settings, forward):
    """So that a GPU gets them from pinned memory where the weights of a mix change, and nothing is pinned for once."""
    settings()
    sent, plain = [], fold.vectors_on_device
    monkeypatch.setattr(fold, "vectors_on_device", lambda *args: sent.append(args[-1]) or plain(*args))
    model = small_model(seed=35 + forward, dtype=torch.float16)
    one, two = (adapter(model, seed, decomposition="svd") for seed in (1, 2))
    for weight in (0.3, 0.6):
        patched = apply(model, [(one, weight), (two, 0.5)])[0]
        key, base_weight = next((key, weights(model)[key]) for key in patched.patches)
        dtype = torch.float16 if forward else torch.float32
        for _ in range(3):
            calculate_weight(patched.patches[key], base_weight.clone(), key, intermediate_dtype=dtype)
    assert sent == [True, False] * 2  # the third time finds the change


@pytest.mark.parametrize(("decomposition", "disk", "left"), [("svd", 8, True), ("svd", 0, False), ("lq", 8, False)])
def test_beside_changes_used_in_every_forward_the_largest_bases_are_left_to_the_disk(
    monkeypatch, settings, counted, decomposition, disk, left
):
    """Both together take at most 4 bytes a number then; another mix reads them again and decomposes nothing."""
    settings(disk=disk)
    model = small_model(seed=33, dtype=torch.bfloat16)
    parts = [(adapter(model, decomposition=decomposition), 0.7)]
    patched = apply(model, parts)[0]
    exact = loaded(patched)
    load(model)
    base_weights, before = weights(model), dict(counted)
    forwards = [LowVramPatch(key, patched.patches) for key in patched.patches]
    for _ in range(2):  # the merge was the first time
        results = {lazy.key: lazy(base_weights[lazy.key].clone()) for lazy in forwards}
    CACHE.flush()
    changes = sum(change.data.nbytes for change in fold_of(patched)._changes.values())
    changing = [base_weights[key] for key in patched.patches]  # of lq the first min(out, in) rows
    numbers = sum((w[: w.shape[1]] if decomposition == "lq" else w).numel() for w in changing)
    assert numbers <= changes <= 1.1 * numbers
    assert (kept_bytes(patched) == 0) is left
    assert not left or all(CACHE._in_memory(wanted[0]) is None for wanted in fold_of(patched).wanted.values())
    with monkeypatch.context() as forbidding:
        forbidding.setattr(CACHE, "leave_to_disk", None)  # nor is looked for in every forward to come
        assert same(results, {lazy.key: lazy(base_weights[lazy.key].clone()) for lazy in forwards})
    assert same(exact, loaded(patched))  # the vectors are at hand again
    loaded(apply(model, [*parts, (adapter(model, 2, decomposition=decomposition), 0.3)])[0])
    assert counted["decomposed"] == before["decomposed"]


@pytest.mark.parametrize(("decomposition", "wide"), [("svd", True), ("lq", False), ("qr", False)])
def test_another_strength_gives_what_it_gives_alone(monkeypatch, settings, decomposition, wide):
    """Of svd by what is kept of the change in 16 bits, for which the vectors are left to the disk."""
    settings()
    model = small_model(seed=34, dtype=torch.float16)
    one = adapter(model, decomposition=decomposition)
    tried = {}
    for strength in (0.4, 0.9, 1.4, -0.6, 0.9):
        patched = apply(model, [(one, strength)])[0]
        tried[strength] = loaded(patched)
        CACHE.flush()
    numbers = sum(weights(model)[key].numel() for key in patched.patches)
    changes = sum(change.data.nbytes for change in fold_of(patched)._changes.values())
    assert (2 * numbers < changes < 2.2 * numbers) if wide else not changes
    assert (kept_bytes(patched) == 0) is wide
    for strength, found in tried.items():
        monkeypatch.setattr(fold, "_shared", {})
        assert same(found, loaded(apply(model, [(one, strength)])[0]))


def test_what_a_mix_read_from_the_disk_is_left_to_it_again_by_one_that_needs_it_no_more(settings):
    settings()
    model = small_model(seed=38, dtype=torch.float16)
    one, two = (adapter(model, seed, decomposition="svd") for seed in (1, 2))
    for strength in (0.4, 0.9):
        alone = apply(model, [(one, strength)])[0]
        loaded(alone)
    CACHE.flush()
    wanted = [key for key, _ in fold_of(alone).wanted.values()]

    def in_memory():
        return [CACHE._in_memory(key) is not None for key in wanted]

    assert not any(in_memory())
    loaded(apply(model, [(one, 0.9), (two, 0.3)])[0])
    assert all(in_memory())
    loaded(alone)
    assert not any(in_memory())


def test_strengths_of_one_adapter_share_what_does_not_hang_on_them(settings, monkeypatch):
    """Under low VRAM also the change of the spectrum, which a forward of another strength then finds."""
    settings()
    model, made = small_model(seed=30, dtype=torch.bfloat16), []
    of = fold.compressed_change
    monkeypatch.setattr(fold, "compressed_change", lambda *change: made.append(change) or of(*change))
    one, other = adapter(model), adapter(model, 2)
    weak, strong = (apply(model, [(one, strength)])[0] for strength in (0.4, 1.2))
    assert fold_of(weak) is fold_of(strong)
    assert fold_of(weak) is not fold_of(apply(model, [(other, 0.4)])[0])
    assert fold_of(weak) is not fold_of(apply(model, [(one, 0.4), (other, 0.4)])[0])
    load(model)
    key, base_weight = next((key, weights(model)[key]) for key in weak.patches)
    rounds = [[LowVramPatch(key, one.patches)(base_weight.clone()) for one in (weak, strong)] for _ in range(3)]
    for patched, results in zip((weak, strong), zip(*rounds, strict=True), strict=True):
        exact = calculate_weight(patched.patches[key], base_weight.float(), key)
        assert torch.equal(results[0], results[2])
        assert (results[0] - exact).norm() < 0.03 * (exact - base_weight).norm()
    assert len(made) == 2  # the first time, and when it is kept
    settings(memory=0, disk=0)
    assert fold_of(apply(model, [(one, 0.4)])[0]) is not fold_of(apply(model, [(one, 0.5)])[0])


@pytest.mark.parametrize("decomposition", ["lq", "svd"])
@pytest.mark.parametrize("order", [list, reversed, lambda keys: random.Random(0).sample(keys, len(keys))])
def test_changes_made_together_are_those_made_alone(monkeypatch, settings, decomposition, order):
    """As on a GPU, where neighbours of one shape are made ahead of their time; in whatever order they are asked for."""
    settings()
    model = small_model(seed=39, dtype=torch.float16)
    base_weights = weights(model)
    parts = [(adapter(model, seed, decomposition=decomposition), 0.5) for seed in (1, 2)]
    made, together = [], fold.compressed_changes
    monkeypatch.setattr(fold, "compressed_changes", lambda *changes: made.append(changes) or together(*changes))

    def forward():
        monkeypatch.setattr(fold, "_shared", {})
        patched = apply(model, parts)[0]
        found = {
            key: calculate_weight(
                patched.patches[key], base_weights[key].clone(), key, intermediate_dtype=torch.float16
            )
            for key in order(list(patched.patches))
        }
        return found, fold_of(patched)

    alone, _ = forward()
    assert not made
    monkeypatch.setattr(fold, "CPU", torch.device("meta"))
    found, used = forward()
    assert same(alone, found)
    assert sum(len(spectra) for spectra, _ in made) <= len(alone) and len(made) < len(alone) / 3
    assert not used._ahead


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_core_may_ask_for_a_strength_of_its_own(strength):
    model = small_model()
    one = adapter(model)
    patched = apply(model, [(one, 1.0)])[0]
    base_weights = weights(model)
    expected = loaded(apply(model, [(one, strength)])[0])
    for key, (entry,) in patched.patches.items():
        found = entry[1].calculate_weight(base_weights[key].clone(), key, strength, 1.0, None, None)
        assert torch.allclose(found, expected[key], atol=1e-6)
        if strength in (0.0, 1.0):
            assert torch.equal(found, expected[key])


def fold_of(patched):
    return next(iter(patched.patches.values()))[0][1].weights[0]


def kept_bytes(patched):
    return sum(side.nbytes for b in fold_of(patched).bases.values() for side in (b.left, b.right) if side is not None)


@pytest.mark.parametrize("decomposition", ["lq", "svd"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_with_caching_off_nothing_is_kept(settings, counted, decomposition, dtype, near):
    """However often the model is loaded; of an fp32 model, whose merges look like forwards, no more than once."""
    settings()
    model = small_model(seed=25, dtype=dtype)
    one = sketched(model, decomposition)
    expected = loaded(apply(model, [(one, 0.8)])[0])
    settings(memory=0, disk=0)
    assert CACHE.size == 0
    assert not any((Path(folder_paths.get_user_directory()) / "soda" / "bases").glob("*"))
    patched, _, report = apply(model, [(one, 0.8)])
    assert not report.warnings and not fold_of(patched).bases
    for kept in (0, 56, 56) if dtype == torch.float32 else (0, 0, 0):
        after = loaded(patched)
        assert all(torch.allclose(after[key], expected[key], atol=near) for key in after)
        assert CACHE.size == 0 and len(fold_of(patched).bases) + len(fold_of(patched)._changes) == kept
        load(model)  # takes the patches off, so that they are asked for anew


@pytest.mark.parametrize("decomposition", ["lq", "svd"])
@pytest.mark.parametrize("memory", [0, 6])
def test_a_direction_that_a_weight_lacks_stays_out_every_time(settings, decomposition, memory):
    settings()
    model = small_model(seed=27)
    shape = shapes(model)
    short = [key for key in attention_weights(model).values() if shape[key][0] <= shape[key][1]]
    with torch.inference_mode():
        for name, weight in model.model.named_parameters():
            if name in short:
                weight[-1] = 0.0
    one = adapter(model, size=1.0, decomposition=decomposition)
    still = replace(one, layers={n: tuple(replace(t, logs=tuple(0 * log for log in t.logs)) for t in terms)
                                 for n, terms in one.layers.items()})  # fmt: skip
    settings(memory=memory, disk=0)
    patched = apply(model, [(still, 1.0)])[0]
    plain = weights(model)
    for _ in range(4):
        after = {key: calculate_weight(patched.patches[key], plain[key].clone(), key) for key in short}
        assert all(row.count_nonzero() == 0 for row in (weight[-1] for weight in after.values()))
        assert not any(torch.allclose(weight, plain[key]) for key, weight in after.items())


def test_a_model_too_large_for_the_memory_is_adapted_and_the_user_told(settings):
    settings()
    model = small_model(seed=26)
    one = adapter(model)
    kept = apply(model, [(one, 1.0)])[0]
    size = kept_bytes(kept)
    expected = loaded(kept)
    settings(memory=size / 2 / 2**30)
    patched, _, report = apply(model, [(one, 1.0)])
    assert len(report.warnings) == 1 and "Settings > SODA" in report.warnings[0] and CACHE.size <= size / 2
    assert not fold_of(patched).bases
    after = loaded(patched)
    assert all(torch.allclose(after[key], expected[key], atol=1e-6) for key in after)


def test_kept_bases_take_two_bytes_a_number_of_the_weights(settings):
    settings()
    model = small_model(seed=27)
    patched = apply(model, [(adapter(model), 1.0)])[0]
    numbers = sum(weights(model)[key].numel() for key in attention_weights(model).values())
    assert 0 < kept_bytes(patched) <= 2 * numbers


def test_the_disk_gives_them_back_to_another_model_object(settings, counted):
    settings()
    expected = loaded(apply(small_model(seed=28), [(adapter(small_model(seed=28)), 1.0)])[0])
    settings(memory=0)  # what lies in memory goes, as in a restart
    settings()
    counted["decomposed"] = 0
    model = small_model(seed=28)
    assert same(expected, loaded(apply(model, [(adapter(model), 1.0)])[0]))
    assert counted["decomposed"] == 0


def test_what_patches_share_goes_with_them():
    model = small_model(seed=29)
    patched = apply(model, [(adapter(model), 1.0)])[0]
    loaded(patched)
    shared = weakref.ref(fold_of(patched))
    load(model)
    del patched
    gc.collect()
    assert shared() is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"SODA.basesInMemory": "much"}', '{"SODA.basesInMemory": -3}'])
def test_settings_that_cannot_be_read_are_the_defaults(settings, content):
    settings()
    (Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json").write_text(content)
    assert base.bounded_cache().memory == (0 if "-3" in content else basis_cache.MEMORY_BYTES)


def test_models_of_strengths_tried_before_keep_nothing_ready():
    """ComfyUI's cache holds them all; what was made for a device must not pile up there, and comes back when asked."""
    model = small_model()
    one = adapter(model)
    tried = [apply(model, [(one, 0.1 * number)])[0] for number in range(1, 10)]
    for patched in tried:
        load(patched)
    gc.collect()
    assert sum(type(o) is Ready for o in gc.get_objects()) <= FOLDS * len(one.layers)
    load(tried[0])
    first = weights(tried[0])
    load(model)
    load(apply(model, [(one, 0.1)])[0])
    assert same(first, weights(model))
