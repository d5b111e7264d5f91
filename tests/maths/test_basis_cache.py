"""The cache of bases: what is computed how often, what it keeps, and what it reads and writes behind the job."""

import threading

import pytest
import torch
from some_bases import filled, near, same, size_on_disk, some_weights

from soda import basis_cache
from soda.basis_cache import BasisCache, samples, weight_hash
from soda.basis_folder import BasisFolder
from soda.decomposition import decompose


class Model:
    """Something that can be referred to weakly."""


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


def test_vectors_come_after_their_outlines(tmp_path, monkeypatch, computed):
    weights = some_weights(2 * basis_cache.READERS)
    first = filled(BasisCache(folder=tmp_path), weights)
    going, plain = threading.Event(), BasisFolder.get
    monkeypatch.setattr(BasisFolder, "get", lambda *args: going.wait() and plain(*args))
    cache, keys = BasisCache(folder=tmp_path), {name: (weight_hash(w), "lq") for name, w in weights.items()}
    found = dict(cache.bases(weights, "lq", outlines=True))
    assert all(same(found[name], first[name].outline()) and not found[name].whole for name in weights)
    for _ in range(2):  # asked for twice they are read once
        cache.read_ahead((key, weights[name].shape) for name, key in keys.items())
    assert cache.size == 0 and len(cache._coming) == len(weights)
    threading.Timer(0.1, going.set).start()
    assert all(same(cache.get(key, weights[name].shape), first[name]) for name, key in reversed(keys.items()))
    assert not cache._coming and len(computed) == len(weights)
    found = dict(cache.bases(weights, "lq", outlines=True))  # in memory they are whole
    assert all(same(found[name], first[name]) for name in weights)


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


def test_a_sample_sees_every_part_of_a_weight():
    """Also where the width divides a fixed step: numbers of few columns would be seen otherwise."""
    w = torch.zeros(1280, 1280)
    for place in (slice(100, 140), slice(1200, 1280)):
        changed = w.clone()
        changed[place] = 1
        first, *others = samples([w, changed, changed.mT.contiguous(), w.half(), w.view(640, 2560)])
        assert first not in others and [first] == samples([w.clone()])
