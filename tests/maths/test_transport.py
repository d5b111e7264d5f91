"""Adapters for another base: what is fitted, what is kept, and when it is refused."""

from __future__ import annotations

import json

import pytest
import torch

from soda.adapter import Adapter, Layer
from soda.decomposition import decompose, spectral_change
from soda.errors import SodaMixError
from soda.fingerprint import base_hash, sketch
from soda.fit import spectrum_error
from soda.kronecker import factor_sizes
from soda.transport import fitted, transport

SHAPES = [(12, 12), (8, 12), (12, 8)]


def weights(seed: int, noise: float = 0.0) -> dict[str, torch.Tensor]:
    """Of one base, or of one at this relative distance from it."""
    g, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    found = {}
    for n, shape in enumerate(SHAPES):
        w = torch.randn(shape, generator=g)
        found[f"layer{n}"] = w + noise * torch.randn(shape, generator=other)
    return found


def adapter(base: dict[str, torch.Tensor], kind: str) -> Adapter:
    g = torch.Generator().manual_seed(1)
    layers = {}
    for name, w in base.items():
        logs = tuple(torch.randn(n * (n - 1) // 2, generator=g)
                     for n in factor_sizes(w.shape[0] if kind == "qr" else w.shape[1], 2))  # fmt: skip
        delta = None if kind == "none" else 0.1 * torch.randn(min(w.shape), generator=g)
        seen = None if delta is None else sketch(spectral_change(decompose(w, kind), delta, w))
        layers[name] = (Layer(kind, delta, logs, seen),)
    return Adapter(layers, {"soda.base_model": "first", "soda.base_hash": "x", "soda.role": "style"}, "one")


def changes(one: Adapter, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: spectral_change(decompose(base[name], term.decomposition), term.delta, base[name])
        for name, (term,) in one.layers.items()
    }


@pytest.mark.parametrize("kind", ["lq", "svd", "qr"])
def test_onto_the_same_base_it_stays_what_it_is(kind):
    base = weights(1)
    one = adapter(base, kind)
    moved, kept = transport(one, base, base, "same")
    assert kept == pytest.approx(1, abs=1e-6)
    for name, (term,) in one.layers.items():
        assert torch.allclose(moved.layers[name][0].delta, term.delta, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(moved.layers[name][0].logs, term.logs, strict=True))


@pytest.mark.parametrize("kind", ["lq", "svd", "qr"])
@pytest.mark.parametrize("noise", [0.02, 0.5])
def test_the_spectrum_is_the_nearest_there_is(kind, noise):
    """Against least squares over D's entries, with D of each unit delta as its columns."""
    first, second = weights(1), weights(2, noise)
    one = adapter(first, kind)
    moved, kept = transport(one, first, second, "second")
    wanted, found = changes(one, first), changes(moved, second)
    lost = whole = 0.0
    for name, target in wanted.items():
        basis, k = decompose(second[name], kind), min(target.shape)
        columns = torch.stack([spectral_change(basis, unit, second[name]).flatten() for unit in torch.eye(k)], 1)
        delta = torch.linalg.lstsq(columns.double(), target.flatten().double()[:, None]).solution[:, 0]
        if kind == "svd":
            delta = torch.maximum(delta, -basis.spectrum.double())
        assert torch.allclose(moved.layers[name][0].delta.double(), delta, atol=1e-4)
        lost, whole = lost + (found[name] - target).square().sum(), whole + target.square().sum()
        direct = changes(one, second)[name]
        assert (found[name] - target).norm() <= (direct - target).norm() + 1e-5
    assert kept == pytest.approx(float(1 - lost / whole), abs=1e-4) and kept < 1 - 1e-5


def test_the_new_file_belongs_to_the_new_base():
    first, second = weights(1), weights(2, 0.3)
    one = adapter(first, "lq")
    moved, kept = transport(one, first, second, "second")
    bases = {name: decompose(w, "lq") for name, w in second.items()}
    assert spectrum_error((t, bases[n]) for n, (t,) in one.layers.items()) > 0.2
    assert spectrum_error((t, bases[n]) for n, (t,) in moved.layers.items()) < 1e-4
    assert moved.metadata["soda.base_model"] == "second" and moved.metadata["soda.role"] == "style"
    assert moved.metadata["soda.base_hash"] == base_hash(second)
    told = json.loads(moved.metadata["soda.transported"])
    assert told == {"from": "first", "kept": round(kept, 4), "hash": one.content_hash}
    assert one.metadata["soda.base_model"] == "first"


def test_a_rotation_alone_needs_no_fit():
    first, second = weights(1), weights(2, 0.3)
    one = adapter(first, "none")
    moved, kept = transport(one, first, second, "second")
    assert kept == 1 and moved.content_hash == one.content_hash


def test_a_singular_value_is_not_pushed_below_zero():
    """A change that would turn the values 3, 2 and 1 negative; lq has no such bound."""
    w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    for kind, expected in (("svd", [-3.0, -2.0, -1.0]), ("lq", [-4.0, -4.0, -4.0])):
        delta = fitted(decompose(w, kind), -4.0 * torch.eye(3))
        torch.testing.assert_close(delta, torch.tensor(expected))


def test_dead_directions_stay_dead():
    flat = torch.zeros(6, 6)
    flat[0, 0] = 1.0
    delta = fitted(decompose(flat, "svd"), torch.ones(6, 6))
    assert delta.count_nonzero() == 1


def test_another_original_and_another_architecture_are_refused():
    first, second = weights(1), weights(2, 0.5)
    with pytest.raises(SodaMixError, match=r"'one' was trained on other weights \(first\).*%"):
        transport(adapter(first, "lq"), second, first, "x")
    wrong = {name: torch.randn(9, 9) for name in second}
    with pytest.raises(SodaMixError, match="layer 'layer0'.*width 12"):
        transport(adapter(first, "lq"), first, wrong, "x")
