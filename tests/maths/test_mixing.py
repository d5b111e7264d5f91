"""Mixing: the sums written out, and the invariants that people rely on."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soda.adapt import adapt
from soda.adapter import Adapter, Layer
from soda.decomposition import decompose, spectral_change
from soda.errors import SodaMixError
from soda.fingerprint import sketch
from soda.mixing import mix
from soda.mixing.lie import lie_sum
from soda.mixing.terms import terms_by_layer
from soda.mixing.together import alike

SIZES = (2, 3, 4)
W = torch.randn(10, 24, generator=torch.Generator().manual_seed(0))
BASIS = decompose(W, "lq")
WEIGHTS = st.floats(-3, 3, allow_nan=False).filter(lambda w: abs(w) > 1e-3)


def adapter(seed, kind="lq", sizes=SIZES, names=("a", "b"), **metadata):
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for name in names:
        delta = None if kind == "none" else 0.1 * torch.randn(10, generator=g)
        logs = tuple(0.1 * torch.randn(n * (n - 1) // 2, generator=g) for n in sizes)
        known = None if delta is None else sketch(spectral_change(BASIS, delta, W))
        layers[name] = (Layer(kind, delta, logs, known),)
    return Adapter(layers, {f"soda.{key}": value for key, value in metadata.items()}, f"adapter {seed}")


def tensors(mixed):
    return [t for name in sorted(mixed.layers) for term in mixed.layers[name] for t in (term.delta, *term.logs)]


@given(st.lists(WEIGHTS, min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_the_mix_is_the_weighted_sum(weights):
    parts = [(adapter(i), w) for i, w in enumerate(weights)]
    (mixed,) = mix(parts).layers["a"]
    for j in range(3):
        expected = sum(w * a.layers["a"][0].logs[j].double() for a, w in parts)
        assert torch.allclose(mixed.logs[j].double(), expected, atol=1e-7)
    assert torch.allclose(mixed.delta.double(), sum(w * a.layers["a"][0].delta.double() for a, w in parts), atol=1e-7)


@given(st.lists(WEIGHTS, min_size=2, max_size=4))
@settings(max_examples=15, deadline=None)
def test_no_order_changes_a_bit(weights):
    """Also with equal adapters at unlike weights."""
    parts = [(adapter(i // 2), w) for i, w in enumerate(weights)]
    first = mix(parts)
    for order in itertools.permutations(parts):
        again = mix(order)
        assert again.content_hash == first.content_hash
        assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again), strict=True))


def test_one_adapter_is_recovered_exactly():
    one, other = adapter(1), adapter(2)
    assert mix([(one, 1.0)]).content_hash == one.content_hash
    assert mix([(other, 0.0), (one, 1.0)]).content_hash == one.content_hash
    assert mix([(one, 0.25), (one, 0.75)]).content_hash == one.content_hash


def test_a_mixs_sketch_is_that_of_its_change():
    (mixed,) = mix([(adapter(1), 0.6), (adapter(2), -1.2)]).layers["a"]
    assert torch.allclose(mixed.sketch, sketch(spectral_change(BASIS, mixed.delta, W)), atol=1e-5)


def test_layers_that_only_one_adapter_has_stay():
    mixed = mix([(adapter(1, names=("a",)), 0.5), (adapter(2, names=("b",)), 2.0)])
    assert list(mixed.layers) == ["a", "b"]
    assert torch.allclose(mixed.layers["b"][0].delta, 2 * adapter(2, names=("b",)).layers["b"][0].delta)


def test_unlike_forms_stay_side_by_side():
    mixed = mix([(adapter(1), 1.0), (adapter(2, kind="svd"), 1.0), (adapter(3, sizes=(4, 6)), 1.0)])
    single, reason = mixed.is_single_form()
    assert len(mixed.layers["a"]) == 3 and not single and "'a'" in reason and "(4, 6)" in reason


def test_lq_and_none_of_equal_sizes_are_one_lq():
    """(W0 + D) R^T either way, so that a file can hold it."""
    parts = [(adapter(1), 0.5), (adapter(2, kind="none"), 1.5)]
    mixed = mix(parts)
    (term,) = mixed.layers["a"]
    assert mixed.is_single_form() == (True, "") and term.decomposition == "lq"
    assert torch.equal(term.delta, 0.5 * parts[0][0].layers["a"][0].delta) and term.sketch is not None
    apart = [layer.scaled(w) for a, w in parts for layer in a.layers["a"]]
    assert torch.allclose(adapt(W, [term], {"lq": BASIS}), adapt(W, apart, {"lq": BASIS}), atol=1e-6)


def test_a_form_of_weight_zero_does_not_stay():
    assert mix([(adapter(1), 1.0), (adapter(2, kind="svd"), 0.0)]).is_single_form() == (True, "")


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_must_be_finite(weight):
    with pytest.raises(SodaMixError, match="adapter 1"):
        mix([(adapter(1), weight), (adapter(2), 1.0)])


def test_nothing_to_mix():
    with pytest.raises(SodaMixError, match="at least one"):
        mix([])


def test_spectra_of_unlike_length_are_refused():
    short = adapter(2)
    (layer,) = short.layers["a"]
    short = Adapter({"a": (Layer("lq", layer.delta[:7], layer.logs),)}, {}, "short")
    with pytest.raises(SodaMixError, match="'a'.*7 and 10"):
        mix([(adapter(1), 1.0), (short, 1.0)])


def test_metadata_keeps_what_agrees_and_lists_the_parts():
    one, two = (adapter(i, role=role, base_model="m.safetensors") for i, role in ((1, "subject"), (2, "style")))
    one.metadata["modelspec.trigger_phrase"], two.metadata["modelspec.trigger_phrase"] = "sks", "in hatch style"
    mixed = mix([(one, 0.5), (two, 0.5)])
    assert mixed.role == "other" and mixed.metadata["soda.base_model"] == "m.safetensors"
    assert mixed.metadata["modelspec.merged_from"] == "adapter 1, adapter 2"
    assert mixed.metadata["modelspec.trigger_phrase"] == "sks, in hatch style"
    assert json.loads(mixed.metadata["soda.mix_operator"]) == {"operator": "lie_sum"}
    pruned = mix([(one, 0.5), (two, 0.5)], operator="dare", density=0.9, seed=3)
    assert json.loads(pruned.metadata["soda.mix_operator"]) == {"operator": "dare", "density": 0.9, "seed": 3}
    assert mix([(one, 0.5), (one, 0.2)]).role == "subject"


def test_no_order_changes_a_bit_where_it_would_change_all():
    """1 + 2^60 - 2^60 is 1 or 0, by the order of the sum."""
    parts = [
        (Adapter({"a": (Layer("lq", torch.tensor([value]), (torch.tensor([value]),)),)}), 1.0)
        for value in (1.0, 2.0**60, -(2.0**60), 3.0)
    ]
    assert len({mix(order).content_hash for order in itertools.permutations(parts)}) == 1


@pytest.mark.parametrize("sketched", [True, False])
def test_adapters_that_are_alike_are_summed_in_one_pass_to_the_same_bits(make_layer, sketched):
    def adapter(seed):
        layers = {}
        for i, (kind, shape, sizes) in enumerate(
            [("lq", (6, 8), (2, 4)), ("none", (5, 9), (3, 3)), ("qr", (4, 7), (4,))]
        ):
            layer = make_layer(kind, shape, sizes, 10 * seed + i)
            layers[f"layer{i}"] = (layer if sketched else replace(layer, sketch=None),)
        return Adapter(layers)

    parts = [(adapter(seed), 0.3 * seed - 0.7) for seed in range(5)]
    assert alike(parts)
    fast = mix(parts).layers
    slow = lie_sum(terms_by_layer(parts))
    assert list(fast) == list(slow)
    for name, (layer,) in fast.items():
        (other,) = slow[name]
        assert layer.decomposition == other.decomposition
        for a, b in zip(
            (layer.delta, *layer.logs, layer.sketch), (other.delta, *other.logs, other.sketch), strict=True
        ):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_adapters_that_are_not_alike_are_summed_layer_by_layer(make_layer):
    one = Adapter({name: (make_layer("lq", (6, 8), (2, 4), i),) for i, name in enumerate("ab")})
    other = Adapter({"a": (make_layer("lq", (6, 8), (2, 4), 5),)})
    unlike = Adapter({name: (make_layer("svd", (6, 8), (2, 4), i),) for i, name in enumerate("ab")})
    two = Adapter({"a": (make_layer("lq", (6, 8), (2, 4), 1), make_layer("svd", (6, 8), (2, 4), 2))})
    assert not alike([(one, 1.0), (other, 1.0)])
    assert not alike([(one, 1.0), (unlike, 1.0)])
    assert not alike([(one, 1.0), (one, 0.5)])
    assert not alike([(one, {"a": 0.5})]) and not alike([(two, 0.5)])
    assert alike([(one, 0.5)]) and not alike([])
