"""The cache of bases: what is computed how often, what it keeps, and what it reads and writes behind the job."""

import pytest
from some_bases import filled, near, same, size_on_disk, some_weights

from soda import basis_cache
from soda.basis_cache import BasisCache
from soda.decomposition import decompose


class Model:
    """Something that can be referred to weakly."""


@pytest.fixture
def hashed(monkeypatch):
    """How many weights were hashed whole."""
    calls = []
    plain = basis_cache.weight_hashes
    monkeypatch.setattr(basis_cache, "weight_hashes", lambda weights: calls.extend(weights) or plain(weights))
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
