"""Parameters and loop: identity at the start, the formula, its gradients, and a planted adapter that is found."""

import math

import pytest
import torch

from soda.adapt import adapt
from soda.adapter import Adapter
from soda.decomposition import decompose
from soda.errors import SodaTrainingError
from soda.fingerprint import sketch
from soda.mixing import mix
from soda.training.loop import Unwatched
from soda.training.loop import train as run_to_the_end
from soda.training.parameters import SodaParameters
from soda.training.plan import PLANS
from soda.training.run import Losses, TrainingRun
from soda.training.settings import TrainingSettings

KINDS = ["lq", "svd", "qr", "none"]
SHAPES = {"a": (12, 12), "b": (12, 20), "c": (20, 12), "d": (12, 12), "e": (7, 7), "f": (6, 320)}


def weights(scale=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


def bases(w, kind):
    return {} if kind == "none" else {kind: decompose(w, kind)}


def distance_to(targets):
    return lambda adapted, step: sum((adapted[name] - targets[name]).square().sum() for name in targets)


class Watch(Unwatched):
    """Calls `step` after each step."""

    def __init__(self, step):
        self.step = step


def train(parameters, loss, settings, step=lambda *_: None):
    """With loss(adapted weights, step)."""
    run = TrainingRun(parameters, settings)
    return run_to_the_end(run, lambda step: step, lambda w, i: Losses(*[loss(w, i)] * 2), Watch(step))


def trained(kind, steps=15, factors=3, rate=0.03):
    """Parameters away from the identity, with deltas large enough to reach the floor of svd."""
    parameters = SodaParameters(weights(), kind, factors)
    targets = weights(0.1, seed=1)
    train(parameters, distance_to(targets), TrainingSettings(steps, rate))
    return parameters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factors", [1, 2, 3, 5])
def test_the_start_is_the_base_bit_for_bit(kind, factors):
    base = weights()
    adapted = SodaParameters(base, kind, factors)()
    assert adapted.keys() == base.keys()
    assert all(torch.equal(adapted[name], base[name]) for name in base)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_what_was_trained(kind):
    """forward() against adapt() on layers(): two independent paths from the numbers to the weight."""
    parameters = trained(kind)
    layers, adapted = parameters.layers(), parameters()
    for name, base in weights().items():
        again = adapt(base, layers[name], bases(base, kind))
        assert torch.allclose(again, adapted[name], atol=1e-5)
        assert not torch.allclose(again, base, atol=1e-2)


@pytest.mark.parametrize("plan", PLANS[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_every_plan_trains_the_same_adapter(kind, plan):
    """The parameters are those of the fast plan, so that a run's state goes from one plan to another."""
    base, targets, found = weights(), weights(0.1, seed=1), {}
    for name in (PLANS[0], plan):
        parameters = SodaParameters(base, kind, plan=name)
        losses = train(parameters, distance_to(targets), TrainingSettings(15, 0.03))
        found[name] = losses, parameters.layers(), parameters
    assert found[plan][0] == pytest.approx(found[PLANS[0]][0], rel=1e-5)
    for name, (layer,) in found[plan][1].items():
        (other,) = found[PLANS[0]][1][name]
        pairs = zip((layer.delta, layer.sketch, *layer.logs), (other.delta, other.sketch, *other.logs), strict=True)
        for a, b in pairs:
            assert a is None and b is None or torch.allclose(a, b, atol=1e-4)
    fast, apart = found[PLANS[0]][2], found[plan][2]
    apart.load_state_dict(fast.state_dict())
    held = apart.snapshot()
    assert all(torch.allclose(w, apart()[name], atol=1e-6) for name, w in fast().items())
    for p in apart.parameters():
        p.data.zero_()
    assert all(torch.allclose(w, held[name], atol=1e-6) for name, w in fast().items())


@pytest.mark.parametrize("kind", ["lq", "svd", "qr"])
def test_without_rotation_only_the_spectrum_is_trained(kind):
    """SVDiff and its kin: no factor moves, and the adapter has the form of any other, so that it mixes with them."""
    base, targets = weights(), weights(0.1, seed=1)
    parameters = SodaParameters(base, kind, rotation=False)
    assert not parameters.rotations() and all(torch.equal(parameters()[name], base[name]) for name in base)
    losses = train(parameters, distance_to(targets), TrainingSettings(15, 0.03))
    assert losses[-1] < losses[0]
    layers, adapted, turning = parameters.layers(), parameters(), SodaParameters(base, kind).layers()
    for name, w in base.items():
        (layer,) = layers[name]
        assert layer.sizes == turning[name][0].sizes and not any(log.any() for log in layer.logs)
        assert layer.delta.any() and torch.allclose(adapt(w, [layer], bases(w, kind)), adapted[name], atol=1e-5)
    both = mix([(Adapter(layers), 0.5), (Adapter(turning), 0.5)])
    assert both.is_single_form()[0]


def test_without_rotation_and_decomposition_there_is_nothing_to_train():
    with pytest.raises(SodaTrainingError, match="nothing to train"):
        SodaParameters(weights(), "none", rotation=False)


def test_factor_sizes_can_be_given():
    base = {name: w for name, w in weights().items() if name in "bc"}
    layers = SodaParameters(base, factors={12: (6, 1, 2), 20: [20]}).layers()
    assert layers["b"][0].sizes == (20,) and layers["c"][0].sizes == (6, 1, 2)
    for wrong in ({12: (6, 2)}, {20: (4, 4)}, {20: (-4, -5)}, {20: (1,) * 5 + (20,)}):
        with pytest.raises(SodaTrainingError, match="do not turn 20 dimensions"):
            SodaParameters(base, factors={12: (6, 2), **wrong})


@pytest.mark.parametrize("kind", KINDS)
def test_in_half_precision_the_start_is_the_base_and_the_gradients_agree(kind):
    """bf16 has 8 bits: the weights start as the rounded base to the last bit, gradients are within 2 % of fp32's."""
    base, targets = {name: w.bfloat16() for name, w in weights().items()}, weights(0.7, seed=1)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        parameters = SodaParameters(base, kind, dtype=dtype)
        adapted = parameters()
        assert all(adapted[name].dtype == dtype and torch.equal(adapted[name].bfloat16(), base[name]) for name in base)
        sum((adapted[name].float() - targets[name]).square().sum() for name in base).backward()
        trained = [*parameters.rotations(), *parameters.spectra()]
        assert all(p.dtype == torch.float32 for p in trained)
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
    assert (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()


def test_svd_stores_no_negative_singular_value():
    parameters = SodaParameters(weights(), "svd")
    with torch.no_grad():
        for delta in parameters.spectra():
            delta.fill_(-100.0)
    for name, (layer,) in parameters.layers().items():
        assert torch.equal(layer.delta, -decompose(weights()[name], "svd").spectrum)
    assert all(w.abs().max() < 1e-5 for w in parameters().values())


@pytest.mark.parametrize("kind", ["lq", "svd", "qr"])
def test_sketches_are_of_the_stored_change(kind):
    for name, (layer,) in trained(kind).layers().items():
        still = Adapter({name: (layer,)}).layers[name][0]
        rotation_free = type(still)(still.decomposition, still.delta, tuple(torch.zeros_like(x) for x in still.logs))
        base = weights()[name]
        change = adapt(base, [rotation_free], bases(base, kind)) - base
        assert torch.allclose(layer.sketch, sketch(change), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_loss(kind):
    """Central differences along random directions in all parameters."""
    parameters = trained(kind, steps=2)
    targets = weights(0.7)

    def loss():
        return sum((w.double() - targets[name].double()).pow(2).sum() for name, w in parameters().items())

    loss().backward()
    for values in (*parameters.rotations(), *parameters.spectra()):
        direction = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
        slope, h, ends = (values.grad * direction).sum().item(), 2e-3, []
        for sign in (1, -2):
            with torch.no_grad():
                values += sign * h * direction
            ends.append(loss().item())
        with torch.no_grad():
            values += h * direction
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=2e-2, abs=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_adapter_is_found(kind):
    base = weights()
    planted = trained(kind, steps=10, rate=0.02).layers()
    targets = {name: adapt(w, planted[name], bases(w, kind)) for name, w in base.items()}
    parameters = SodaParameters(base, kind)
    losses = train(parameters, distance_to(targets), TrainingSettings(150, 0.02))
    assert losses[-1] < 1e-2 * losses[0]


def test_training_never_writes_the_weights_given():
    base = weights()
    train(SodaParameters(base), distance_to(weights(0.5)), TrainingSettings(3))
    assert all(torch.equal(base[name], w) for name, w in weights().items())


def test_the_same_run_gives_the_same_tensors():
    first, second = (Adapter(trained("lq").layers()) for _ in range(2))
    assert first.content_hash == second.content_hash
    assert mix([(first, 0.5), (second, 0.5)]).content_hash == first.content_hash


def test_a_checkpoint_holds_the_trained_numbers_alone():
    parameters = trained("svd")
    state = parameters.state_dict()
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in parameters.parameters())
    again = SodaParameters(weights(), "svd")
    again.load_state_dict(state)
    assert all(torch.equal(w, again()[name]) for name, w in parameters().items())


def test_dead_directions_are_left_alone():
    low = {"w": torch.randn(8, 3) @ torch.randn(3, 8)}
    parameters = SodaParameters(low, "lq")
    train(parameters, distance_to({"w": torch.randn(8, 8)}), TrainingSettings(5))
    (layer,) = parameters.layers()["w"]
    assert not layer.delta[3:].any() and layer.delta[:3].all()


def test_steps_are_told_in_order():
    told = []
    losses = train(SodaParameters(weights()), distance_to(weights(0.5)), TrainingSettings(4), lambda *s: told.append(s))
    assert told == list(enumerate(losses)) and losses[-1] < losses[0]


def test_a_loss_that_is_not_finite_names_the_step_and_spares_the_parameters():
    """Tried again at lower rates from the last good step, here the first: the same loss, the same end."""
    parameters = SodaParameters(weights())
    before = {name: value.clone() for name, value in parameters.state_dict().items()}
    seen = []

    def loss(adapted, step):
        seen.append(step)
        return distance_to(weights(0.5))(adapted, step) * (math.nan if step == 2 else 1.0)

    with pytest.raises(SodaTrainingError, match="step 3.*lower the learning rate"):
        train(parameters, loss, TrainingSettings(9))
    assert seen == [0, 1, 2] * 4
    assert all(torch.equal(value, before[name]) for name, value in parameters.state_dict().items())


def test_a_gradient_that_is_not_finite_is_an_error_too():
    with pytest.raises(SodaTrainingError, match="step 1"):
        train(
            SodaParameters(weights()),
            lambda w, _: (w["a"] - w["a"].detach()).square().sum().sqrt(),
            TrainingSettings(2),
        )


def test_an_exception_of_the_caller_passes_through():
    def stop(step, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(SodaParameters(weights()), distance_to(weights()), TrainingSettings(5), stop)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(0, 4), torch.full((2, 2), math.nan)])
def test_weights_that_cannot_be_trained(bad):
    with pytest.raises(SodaTrainingError, match="'bad'"):
        SodaParameters({"bad": bad})
    with pytest.raises(SodaTrainingError, match="no weight"):
        SodaParameters({})


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_double_precision(kind, plan):
    """Every single derivative of every adapted weight, in fp64 and away from the identity."""
    g = torch.Generator().manual_seed(3)
    shapes = {"a": (4, 6), "b": (6, 4), "c": (4, 6)}
    base = {name: torch.randn(shape, generator=g).double() for name, shape in shapes.items()}
    parameters = SodaParameters(base, kind, 2, dtype=torch.float64, plan=plan).double()
    names = [name for name, _ in parameters.named_parameters()]
    point = [(p + 0.1 * torch.randn(p.shape, generator=g)).detach().requires_grad_() for p in parameters.parameters()]

    def weights_of(*values):
        return tuple(torch.func.functional_call(parameters, dict(zip(names, values, strict=True)), ()).values())

    assert torch.autograd.gradcheck(weights_of, point, eps=1e-6, atol=1e-6, rtol=1e-6)


def test_what_is_stored_for_dead_directions_is_zero():
    """Whatever an optimizer's momentum or a checkpoint left in them."""
    g = torch.Generator().manual_seed(5)
    parameters = SodaParameters({"w": torch.randn(8, 3, generator=g) @ torch.randn(3, 8, generator=g)}, "svd")
    with torch.no_grad():
        parameters.spectra()[0].fill_(0.25)
    (layer,) = parameters.layers()["w"]
    assert layer.delta.tolist() == [0.25] * 3 + [0.0] * 5


@pytest.mark.parametrize("plan", PLANS)
def test_a_text_encoders_weights_are_made_in_fp32_of_parameters_of_their_own(plan):
    base = weights()
    text = set(list(base)[::2])
    parameters = SodaParameters(base, dtype=torch.bfloat16, plan=plan, text=text)
    adapted = parameters()
    for name, weight in base.items():
        dtype = torch.float32 if name in text else torch.bfloat16
        assert adapted[name].dtype == dtype and torch.equal(adapted[name], weight.to(dtype))
    sum(adapted[name].float().square().sum() for name in text).backward()
    own = {id(p) for p in parameters.of_text_encoder()}
    moved = {id(p) for p in parameters.parameters() if p.grad is not None and p.grad.any()}
    assert moved and moved <= own and len(own) < len(list(parameters.parameters()))
    assert {id(p) for p in (*parameters.rotations(), *parameters.spectra())} >= own
