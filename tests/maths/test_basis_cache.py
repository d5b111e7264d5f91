"""The cache of bases: what is computed how often, bounds, damaged files, two processes, folders that cannot be used."""

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch

from soda import basis_cache, basis_folder
from soda.basis_cache import BasisCache, sample, weight_hash
from soda.basis_folder import SUFFIX, BasisFolder
from soda.decomposition import decompose


class Model:
    """Something that can be referred to weakly."""


def some_weights(count=4, shape=(6, 9), seed=0):
    g = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(shape, generator=g) for i in range(count)}


def filled(cache, weights, decomposition="lq", **options):
    """All bases, and on disk what goes there."""
    found = dict(cache.bases(weights, decomposition, **options))
    cache.flush()
    return found


def same(a, b):
    one, two = a.tensors(), b.tensors()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def near(a, b):
    """The same but for rounding: of a batch unlike that of one matrix alone, and of lq and qr to fp16."""
    one, two = a.tensors(), b.tensors()
    return one.keys() == two.keys() and all(torch.allclose(one[n].float(), two[n].float(), atol=1e-3) for n in one)


def size_on_disk(folder):
    return sum(f.stat().st_size for f in folder.glob(f"*{SUFFIX}"))


@pytest.fixture
def computed(monkeypatch):
    """The names of weights in the order in which they were decomposed."""
    names = []

    def counting(weights, *args, **kwargs):
        for batch in plain(weights, *args, **kwargs):
            names.extend(batch)
            yield batch

    plain = basis_cache.decompose_batches
    monkeypatch.setattr(basis_cache, "decompose_batches", counting)
    return names


@pytest.fixture
def hashed(monkeypatch):
    """How many weights were hashed whole."""
    calls = []
    monkeypatch.setattr(basis_cache, "weight_hash", lambda w: calls.append(1) or weight_hash(w))
    return calls


@pytest.mark.parametrize("decomposition", ["lq", "svd", "qr"])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_what_comes_back_is_what_was_computed(tmp_path, computed, decomposition, shape):
    weights = some_weights(shape=shape)
    first = filled(BasisCache(folder=tmp_path), weights, decomposition)
    assert len(computed) == 4 and all(near(first[n], decompose(w, decomposition)) for n, w in weights.items())
    told = []
    again = BasisCache(folder=tmp_path)
    renamed = {f"other.{name}": w for name, w in weights.items()}
    second = dict(again.bases(renamed, decomposition, progress=lambda *counts: told.append(counts)))
    assert len(computed) == 4 and told == [(i, 4) for i in range(1, 5)]
    assert all(same(first[name], second[f"other.{name}"]) for name in weights)
    assert dict(again.bases(weights, decomposition)).keys() == weights.keys() and len(computed) == 4
    assert list(again.bases(weights, "none")) == []


def test_progress_counts_cached_and_new_together():
    cache, told = BasisCache(), []
    list(cache.bases(some_weights(2), "lq"))
    list(cache.bases(some_weights(4), "lq", progress=lambda *counts: told.append(counts)))
    assert told == [(i, 4) for i in range(1, 5)]


def test_the_hash_knows_numbers_shape_and_type():
    w = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    others = [w.reshape(4, 3), w.half(), w.bfloat16(), w + 1e-6 * w, -w, w.mT]
    assert len({weight_hash(t) for t in (w, *others)}) == 7
    assert weight_hash(w.mT.contiguous().mT) == weight_hash(w.clone()) == weight_hash(w)
    assert weight_hash(w.to(torch.float8_e4m3fn)) != weight_hash(w)


def test_a_known_model_is_neither_hashed_nor_decomposed(computed, hashed):
    cache, model, weights = BasisCache(), Model(), some_weights()
    list(cache.bases(weights, "lq", owner=model))
    assert (len(hashed), len(computed)) == (4, 4)
    list(cache.bases(weights, "lq", owner=model))
    assert (len(hashed), len(computed)) == (4, 4)
    list(cache.bases(weights, "svd", owner=model))
    assert (len(hashed), len(computed)) == (4, 8)
    weights["layer1"] = weights["layer1"] * 2
    list(cache.bases(weights, "lq", owner=model))
    assert (len(hashed), computed[8:]) == (5, ["layer1"])
    list(cache.bases(weights, "lq", owner=Model()))
    assert (len(hashed), len(computed)) == (9, 9)


def test_a_model_that_is_gone_is_forgotten():
    cache, model = BasisCache(), Model()
    list(cache.bases(some_weights(), "lq", owner=model))
    assert len(cache._known) == 4
    del model
    assert not cache._known


def test_memory_is_bounded_and_the_least_recently_used_goes_first(computed):
    weights = some_weights(4)
    one = decompose(weights["layer0"], "lq").kept().nbytes
    cache = BasisCache(memory=3 * one + one // 2)
    list(cache.bases(weights, "lq"))
    assert cache.size == 3 * one
    list(cache.bases({"layer1": weights["layer1"]}, "lq"))
    list(cache.bases({"layer0": weights["layer0"]}, "lq"))
    assert computed[4:] == ["layer0"]
    assert cache.size == 3 * one
    list(cache.bases({"layer1": weights["layer1"], "layer3": weights["layer3"]}, "lq"))
    assert computed[4:] == ["layer0"]
    tiny = BasisCache(memory=one - 1)
    assert len(dict(tiny.bases(weights, "lq"))) == 4 and tiny.size == 0


DAMAGES = ["truncated", "empty", "longer", "noise", "flipped", "half zeros", "zeros", "of another weight", "a folder"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_replaced(tmp_path, computed, damage):
    weights = some_weights(1, (16, 24))
    filled(BasisCache(folder=tmp_path), weights)
    (file,) = tmp_path.glob(f"*{SUFFIX}")
    good = file.read_bytes()
    if damage == "a folder":
        file.unlink()
        file.mkdir()
    elif damage == "of another weight":
        other = tmp_path / "other"
        filled(BasisCache(folder=other), some_weights(1, (16, 24), seed=1))
        os.replace(next(other.glob(f"*{SUFFIX}")), file)
    else:
        middle = len(good) // 2
        file.write_bytes({
            "truncated": good[:middle],
            "empty": b"",
            "longer": good + b"x",
            "noise": (bytes(range(256)) * len(good))[: len(good)],
            "flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "half zeros": good[:middle] + bytes(len(good) - middle),
            "zeros": bytes(len(good)),
        }[damage])  # fmt: skip
    found = filled(BasisCache(folder=tmp_path), weights)
    assert len(computed) == (2 if damage != "of another weight" else 3)
    assert same(found["layer0"], decompose(weights["layer0"], "lq").kept())
    if damage != "a folder":
        assert file.read_bytes() == good


def test_vectors_come_after_their_outlines(tmp_path, monkeypatch, computed):
    weights = some_weights()
    first = filled(BasisCache(folder=tmp_path), weights)
    going, plain = threading.Event(), BasisFolder.get
    monkeypatch.setattr(BasisFolder, "get", lambda *args: going.wait() and plain(*args))
    cache, keys = BasisCache(folder=tmp_path), {name: (weight_hash(w), "lq") for name, w in weights.items()}
    for _ in range(2):  # asked for twice they are read once
        found = dict(cache.bases(weights, "lq", ahead=True))
        assert all(same(found[name], first[name].outline()) and not found[name].whole for name in weights)
    assert cache.size == 0 and len(cache._coming) == 4
    threading.Timer(0.1, going.set).start()
    assert all(same(cache.get(key, weights[name].shape), first[name]) for name, key in keys.items())
    assert not cache._coming and len(computed) == 4
    found = dict(cache.bases(weights, "lq", ahead=True))  # in memory they are whole
    assert all(same(found[name], first[name]) for name in weights)


def test_an_outline_may_be_good_where_the_vectors_are_not(tmp_path):
    weights = some_weights(1)
    first = filled(BasisCache(folder=tmp_path), weights)
    (file,) = tmp_path.glob(f"*{SUFFIX}")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    key = weight_hash(weights["layer0"]), "lq"
    cache = BasisCache(folder=tmp_path)
    assert same(dict(cache.bases(weights, "lq", ahead=True))["layer0"], first["layer0"].outline())
    assert cache.get(key, torch.Size((6, 9))) is None
    assert filled(cache, weights) and same(cache.get(key, torch.Size((6, 9))), first["layer0"])


def test_a_file_that_vanishes_while_it_is_opened_is_as_good_as_none(tmp_path, monkeypatch):
    filled(BasisCache(folder=tmp_path), some_weights(1))
    (file,) = tmp_path.glob(f"*{SUFFIX}")
    read = partial(BasisFolder(tmp_path, 1 << 20).get, (file.name.split(".")[0], "lq"), torch.Size((6, 9)))
    assert read() is not None
    utime = os.utime
    monkeypatch.setattr(os, "utime", lambda path: path.unlink() or utime(path))
    assert read() is not None and not file.exists()
    assert read() is None


def test_memory_that_runs_out_while_a_file_is_read_is_said(tmp_path, monkeypatch):
    weights = some_weights(1)
    filled(BasisCache(folder=tmp_path), weights)

    def full(*_, **__):
        raise RuntimeError("not enough memory")

    folder, key = BasisFolder(tmp_path, 1 << 20), (weight_hash(weights["layer0"]), "lq")
    monkeypatch.setattr(basis_folder.torch, "empty", full)
    with pytest.raises(RuntimeError, match="not enough memory"):
        folder.get(key, torch.Size((6, 9)))


def test_the_folder_is_bounded_and_the_longest_unused_go_first(tmp_path):
    weights = some_weights(40)
    bases = {name: decompose(w, "lq").kept() for name, w in weights.items()}
    folder = BasisFolder(tmp_path, 1)
    folder.put(("layer0", "lq"), bases["layer0"])
    assert not any(tmp_path.iterdir())
    one = 2 * basis_folder.CHECKSUM + bases["layer0"].nbytes
    folder = BasisFolder(tmp_path, 10 * one)
    for age, name in enumerate(weights):
        folder.put((name, "lq"), bases[name])
        os.utime(tmp_path / f"{name}.lq{SUFFIX}", (1e9 + age, 1e9 + age))
        assert size_on_disk(tmp_path) <= 10 * one
        if age == 5:
            assert folder.get(("layer0", "lq"), torch.Size((6, 9))) is not None  # used now: newer than all
    kept = {f.name.split(".")[0] for f in tmp_path.iterdir()}
    assert 7 <= len(kept) <= 10 and "layer39" in kept and "layer0" in kept
    assert {f"layer{i}" for i in range(39 - len(kept) + 2, 40)} == kept - {"layer0"}


def test_two_writers_together_keep_the_bound(tmp_path):
    basis = decompose(some_weights(1)["layer0"], "lq").kept()
    one = 2 * basis_folder.CHECKSUM + basis.nbytes
    writers = [BasisFolder(tmp_path, 20 * one) for _ in range(2)]
    for i in range(60):
        writers[i % 2].put((f"layer{i}", "lq"), basis)
        assert size_on_disk(tmp_path) <= 20 * one
    assert size_on_disk(tmp_path) > 10 * one


def test_what_a_killed_writer_left_is_swept(tmp_path):
    old, new, foreign = (tmp_path / n for n in (f"a{SUFFIX}.part", f"b{SUFFIX}.part", "c.part"))
    for file in (old, new, foreign):
        file.write_bytes(b"x")
        os.utime(file, (time.time() - (7200 if file != new else 0),) * 2)
    BasisFolder(tmp_path, 1 << 20).put(("layer0", "lq"), decompose(some_weights(1)["layer0"], "lq").kept())
    assert not old.exists() and new.exists() and foreign.exists()


def broken_folders(tmp_path, monkeypatch):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    yield blocker / "inside"

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(basis_folder.os, "replace", full)
    yield tmp_path / "full"


def test_a_folder_that_cannot_be_written_does_not_fail_the_job(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    for folder in broken_folders(tmp_path, monkeypatch):
        caplog.clear()
        weights = some_weights()
        cache = BasisCache(folder=folder)
        found = filled(cache, weights)
        assert all(near(found[name], decompose(w, "lq")) for name, w in weights.items())
        assert len(caplog.records) == 1 and str(folder) in caplog.text
        assert not folder.exists() or not any(folder.iterdir())
        assert cache.size > 0  # kept in memory all the same


def _fill(folder, seed, rounds):
    """Write and read in a folder too small for all; exit code 1 if a basis ever came back wrong."""
    torch.set_num_threads(1)
    weights = some_weights(12, (20, 20))
    exact = {name: decompose(w, "lq").kept() for name, w in weights.items()}
    one = exact["layer0"].nbytes + 2 * basis_folder.CHECKSUM
    g = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        cache = BasisCache(memory=0, folder=folder, disk=6 * one)
        names = [f"layer{i}" for i in torch.randperm(12, generator=g)[:5].tolist()]
        for name, basis in cache.bases({n: weights[n] for n in names}, "lq"):
            if not all(torch.allclose(a.float(), b.float(), atol=1e-3) for a, b in zip(
                (basis.right, basis.spectrum), (exact[name].right, exact[name].spectrum), strict=True
            )):  # fmt: skip
                raise SystemExit(1)


def test_processes_share_a_folder(tmp_path):
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=_fill, args=(tmp_path, seed, 25)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    left = list(tmp_path.iterdir())
    assert left and all(file.name.endswith(SUFFIX) for file in left)


def test_other_bounds_hold_at_once(tmp_path, computed):
    weights = some_weights(8)
    one = decompose(weights["layer0"], "lq").kept().nbytes
    cache = BasisCache(folder=tmp_path)
    filled(cache, weights)
    whole = size_on_disk(tmp_path)
    assert cache.size == 8 * one and whole > 8 * one
    cache.bound(3 * one, whole // 2)
    assert cache.size == 3 * one and 0 < size_on_disk(tmp_path) <= whole // 2
    cache.bound(0, 0)
    assert cache.size == 0 and size_on_disk(tmp_path) == 0
    filled(cache, weights)
    assert cache.size == 0 and size_on_disk(tmp_path) == 0 and len(computed) == 16
    cache.bound(1 << 20, 1 << 20)
    filled(cache, weights)
    assert cache.size == 8 * one and size_on_disk(tmp_path) == whole


def test_what_is_computed_faster_than_read_stays_off_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(basis_cache, "READ_RATE", 0.0)
    cache = BasisCache(folder=tmp_path)
    filled(cache, some_weights())
    assert cache.size > 0 and not any(tmp_path.iterdir())


def test_writing_waits_where_too_much_is_left_and_ends_before_the_process_does(tmp_path, monkeypatch):
    basis, going, written = decompose(some_weights(1)["layer0"], "lq").kept(), threading.Event(), []
    plain = BasisFolder.put

    def slow(folder, key, basis):
        going.wait()
        plain(folder, key, basis)
        written.append(key[0])

    monkeypatch.setattr(BasisFolder, "put", slow)
    folder = BasisFolder(tmp_path, 1 << 20)
    for i in range(3):
        folder.put_later((f"layer{i}", "lq"), basis, room=3 * basis.nbytes)
    assert not written
    threading.Timer(0.2, going.set).start()
    folder.put_later(("layer3", "lq"), basis, room=3 * basis.nbytes)
    assert written
    folder.flush()
    assert sorted(written) == [f"layer{i}" for i in range(4)] and folder.get(("layer3", "lq"), torch.Size((6, 9)))

    code = (
        "import torch, sys, soda.basis_folder as f, time; from soda import decompose; plain = f._write\n"
        "f._write = lambda *args: (time.sleep(0.5), plain(*args))\n"
        "folder = f.BasisFolder(sys.argv[1], 1 << 20)\n"
        "folder.put_later(('late', 'lq'), decompose(torch.randn(6, 9), 'lq').kept(), 1 << 20)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert folder.get(("late", "lq"), torch.Size((6, 9))) is not None


def test_a_sample_sees_every_part_of_a_weight():
    """Also where the width divides a fixed step: numbers of few columns would be seen otherwise."""
    w = torch.zeros(1280, 1280)
    for place in (slice(100, 140), slice(1200, 1280)):
        changed = w.clone()
        changed[place] = 1
        assert sample(changed) != sample(w) != sample(changed.mT.contiguous())
