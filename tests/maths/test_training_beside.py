"""Adapters put into parameters: to go on from, and frozen ones beside which a new one is trained."""

import pytest
import torch

from soda.adapt import adapt
from soda.adapter import Adapter, Layer
from soda.decomposition import decompose
from soda.errors import SodaTrainingError
from soda.mixing import mix
from soda.training.layers import added, difference, put
from soda.training.loop import train
from soda.training.parameters import SodaParameters
from soda.training.run import Losses, TrainingRun
from soda.training.settings import TrainingSettings

SHAPES = {"a": (12, 12), "b": (12, 20), "c": (20, 12), "d": (12, 12)}


def weights(scale=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


def pulled(adapted, targets):
    """Towards other weights."""
    value = sum((w - targets[name]).square().mean() for name, w in adapted.items())
    return Losses(value, value)


def layers_of(seed, kind="lq", scale=0.2):
    """A random adapter's layers for WEIGHTS, of the form that SodaParameters gives them."""
    g = torch.Generator().manual_seed(seed)
    shapes = SodaParameters(weights(), kind).layers()
    return {
        name: (
            Layer(
                kind,
                None if layer.delta is None else torch.randn(layer.delta.shape, generator=g) * scale * 0.1,
                tuple(torch.randn(log.shape, generator=g) * scale for log in layer.logs),
            ),
        )
        for name, (layer,) in shapes.items()
    }


def applied(layers, kind="lq"):
    return {name: adapt(w, layers[name], {kind: decompose(w, kind)} if kind != "none" else {})
            for name, w in weights().items()}  # fmt: skip


@pytest.mark.parametrize("kind", ["lq", "svd", "qr", "none"])
def test_layers_put_in_are_the_layers_that_come_out(kind):
    parameters, layers = SodaParameters(weights(), kind), layers_of(3, kind)
    put(parameters, layers)
    for name, w in applied(layers, kind).items():
        assert torch.allclose(parameters()[name], w, atol=1e-5)
    for name, (layer,) in parameters.layers().items():
        for a, b in zip(layer.logs, layers[name][0].logs, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kind", ["lq", "svd", "qr", "none"])
def test_trained_beside_a_frozen_mix_it_does_in_the_mix_what_it_was_trained_to_do(kind):
    """exp(A + B) is not exp(A) exp(B); yet the mix of the frozen adapters and the new one is what was trained."""
    one, other = Adapter(layers_of(5, kind), {}, "one"), Adapter(layers_of(6, kind), {}, "other")
    frozen = mix([(one, 0.8), (other, -0.5)]).layers
    run = TrainingRun(SodaParameters(weights(), kind), TrainingSettings(steps=30, learning_rate=0.03))
    put(run.parameters, frozen)
    beside = run.parameters.layers()
    before = run.parameters()
    train(run, lambda step: weights(0.2, seed=1), pulled)
    new = Adapter(difference(run.parameters.layers(), frozen, beside), {}, "new")
    together = mix([(one, 0.8), (new, 1.0), (other, -0.5)]).layers
    for name, w in applied(together, kind).items():
        assert torch.allclose(w, run.parameters()[name], atol=2e-5)
        assert not torch.allclose(w, before[name], atol=1e-2)


def test_untrained_beside_a_mix_it_is_nothing():
    parameters, frozen = SodaParameters(weights()), layers_of(5)
    put(parameters, frozen)
    layers = parameters.layers()
    for (layer,) in difference(layers, frozen, layers).values():
        assert all(part.abs().max() < 1e-6 for part in (layer.delta, *layer.logs, layer.sketch))


def test_unlike_forms_are_refused_with_both_named():
    parameters = SodaParameters(weights())
    with pytest.raises(SodaTrainingError, match="a by svd .*this training by lq .*set decomposition and factors"):
        put(parameters, layers_of(5, "svd"))
    with pytest.raises(SodaTrainingError, match="lq .* and svd"):
        put(parameters, added(layers_of(5), layers_of(6, "svd")))
    both = added(layers_of(5), layers_of(6))
    (a,), (b,), (c,) = both["a"], layers_of(5)["a"], layers_of(6)["a"]
    assert torch.equal(a.delta, b.delta + c.delta) and torch.equal(a.logs[1], b.logs[1] + c.logs[1])
