"""ties, dare, karcher and sum_delta against their formulas, number by number."""

import math

import numpy
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from soda.adapt import adapt
from soda.adapter import Adapter, Layer
from soda.decomposition import decompose
from soda.errors import SodaMixError
from soda.mixing import mix, sum_delta

SEEDS = st.integers(0, 2**20)
SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)
WEIGHTS = st.lists(st.floats(0.1, 1.5), min_size=2, max_size=4)
DENSITY = st.floats(0.05, 1.0)


def adapter(seed, sizes, k=7, angle=0.3):
    g = torch.Generator().manual_seed(seed)
    logs = tuple(angle * torch.randn(n * (n - 1) // 2, generator=g) for n in sizes)
    return Adapter({"w": (Layer("lq", torch.randn(k, generator=g), logs),)}, {}, f"adapter {seed}")


def coordinates(mixed):
    (layer,) = mixed.layers["w"]
    return [t.double().numpy() for t in (layer.delta, *layer.logs)]


def together(parts):
    """The coordinates of all parts, tensor by tensor, with the weights."""
    return zip(*(coordinates(a) for a, _ in parts), strict=True), [w for _, w in parts]


def naive_ties(tensors, weights, density):
    trimmed = []
    for t in tensors:
        keep = math.ceil(density * len(t))
        largest = sorted(range(len(t)), key=lambda i: -abs(t[i]))[:keep]
        trimmed.append([t[i] if i in largest else 0.0 for i in range(len(t))])
    result = []
    for numbers in zip(*trimmed, strict=True):
        shares = [w * x for w, x in zip(weights, numbers, strict=True)]
        total = sum(shares)
        result.append(sum(x for x in shares if x * total > 0))
    return numpy.array(result)


@given(seed=SEEDS, sizes=SIZES, weights=st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=4), density=DENSITY)
def test_ties_adds_what_agrees_of_what_is_large(seed, sizes, weights, density):
    parts = [(adapter(seed + i, sizes), w) for i, w in enumerate(weights) if abs(w) > 1e-3]
    assume(parts)
    tensors, weights = together(parts)
    for got, given_tensors in zip(coordinates(mix(parts, operator="ties", density=density)), tensors, strict=True):
        numpy.testing.assert_allclose(got, naive_ties(given_tensors, weights, density), atol=1e-6)


@given(seed=SEEDS, sizes=SIZES, weights=WEIGHTS, density=DENSITY)
def test_dare_keeps_or_drops_each_number_and_adds(seed, sizes, weights, density):
    parts = [(adapter(seed + i, sizes), w) for i, w in enumerate(weights)]

    def drop(given_parts, draw=seed):
        return coordinates(mix(given_parts, operator="dare", density=density, seed=draw))

    single = [drop([(a, 1.0)]) for a, _ in parts]
    for (a, _), tensors in zip(parts, single, strict=True):
        for kept, whole in zip(tensors, coordinates(a), strict=True):
            assert all(x == 0 or abs(x - y / density) < 1e-5 * abs(x) for x, y in zip(kept, whole, strict=True))
    for got, *each in zip(drop(parts), *single, strict=True):  # what one drops is no matter of the others
        numpy.testing.assert_allclose(got, sum(w * t for w, t in zip(weights, each, strict=True)), atol=2e-5 / density)


def test_dare_keeps_its_share_and_is_lie_sum_on_average():
    one = adapter(3, (24, 24), k=400)
    whole = numpy.concatenate(coordinates(one))
    draws = numpy.array([
        numpy.concatenate(coordinates(mix([(one, 1.0)], operator="dare", density=0.3, seed=seed)))
        for seed in range(200)
    ])  # fmt: skip
    kept = draws != 0
    assert abs(kept.mean() - 0.3) < 0.005  # 190,400 throws: five standard deviations
    assert numpy.abs(kept.mean(0) - 0.3).max() < 0.17  # every number takes part
    assert numpy.abs(draws.mean(0) / whole - 1).max() < 0.17 / 0.3
    assert numpy.abs(numpy.corrcoef(kept[:, :40].T) - numpy.eye(40)).max() < 0.4  # and on its own


def test_dare_draws_by_seed_adapter_and_layer():
    layer = adapter(1, (5, 6)).layers["w"]
    twice = mix([(Adapter({"v": layer, "w": layer}), 1.0)], operator="dare")
    assert not torch.equal(twice.layers["v"][0].delta, twice.layers["w"][0].delta)
    first, other = (mix([(adapter(1, (5, 6)), 1.0)], operator="dare", seed=seed) for seed in (0, 1))
    assert first.content_hash != other.content_hash
    assert first.content_hash == mix([(adapter(1, (5, 6)), 1.0)], operator="dare", seed=0).content_hash


def test_dare_draws_the_same_everywhere():
    """The numbers themselves: a file mixed elsewhere, or by another version, can be made again."""
    one = Adapter({"w": (Layer("lq", torch.ones(16), (torch.ones(3),)),)})
    delta, log = coordinates(mix([(one, 1.0)], operator="dare", density=0.5, seed=7))
    assert "".join("01"[int(x > 0)] for x in (*delta, *log)) == "1001011011111101101"


def exp(triangle, n, power=1.0):
    a = numpy.zeros((n, n))
    a[numpy.triu_indices(n, 1)] = triangle
    values, vectors = numpy.linalg.eigh(1j * (a - a.T))
    return ((vectors * numpy.exp(-1j * power * values)) @ vectors.conj().T).real


def log(r):
    """By the eigenvectors of R, good where its angles differ."""
    values, vectors = numpy.linalg.eig(r)
    return ((vectors * (1j * numpy.angle(values))) @ numpy.linalg.inv(vectors)).real


@given(seed=SEEDS, n=st.integers(2, 8), w1=st.floats(0.1, 1.5), w2=st.floats(0.1, 1.5))
def test_karcher_of_two_is_a_point_on_the_geodesic(seed, n, w1, w2):
    one, two = adapter(seed, (n,)), adapter(seed + 1, (n,))
    s = w1 + w2
    start, end = (exp(coordinates(a)[1], n, s) for a in (one, two))
    way = log(start.T @ end)
    assume(numpy.abs(numpy.linalg.eigvals(way)).max() < 2.9)
    delta, mean = coordinates(mix([(one, w1), (two, w2)], operator="karcher"))
    expected = start @ exp(way[numpy.triu_indices(n, 1)], n, w2 / s)
    numpy.testing.assert_allclose(exp(mean, n), expected, atol=2e-6)
    numpy.testing.assert_allclose(delta, w1 * coordinates(one)[0] + w2 * coordinates(two)[0], atol=1e-6)


@given(seed=SEEDS, n=st.integers(3, 8), weights=st.lists(st.floats(0.1, 0.3), min_size=3, max_size=5))
def test_karcher_of_many_is_nearest_to_all(seed, n, weights):
    """No point around it has a lesser sum of squared distances, and the weighted ways from it cancel."""
    parts = [(adapter(seed + i, (n,)), w) for i, w in enumerate(weights)]
    s = sum(weights)
    targets = [exp(coordinates(a)[1], n, s) for a, _ in parts]
    mean = exp(coordinates(mix(parts, operator="karcher"))[1], n)
    ways = [log(mean.T @ target) for target in targets]
    assert numpy.abs(sum(w / s * way for w, way in zip(weights, ways, strict=True))).max() < 2e-6

    def cost(x):
        return sum(w / s * (log(x.T @ target) ** 2).sum() for w, target in zip(weights, targets, strict=True))

    rng = numpy.random.default_rng(seed)
    for _ in range(5):
        aside = mean @ exp(0.05 * rng.standard_normal(n * (n - 1) // 2), n)
        assert cost(aside) > cost(mean)


def test_karcher_of_rotations_that_commute_is_their_lie_sum():
    parts = [(Adapter({"w": (Layer("none", None, (torch.tensor([angle]),)),)}), w) for angle, w in ((0.2, 0.5), (1, 1))]
    assert mix(parts, operator="karcher").layers["w"][0].logs[0].item() == pytest.approx(1.1)


def test_karcher_takes_its_shares_from_those_that_turn_the_side():
    """An output rotation has no say in the mean of the inputs' and keeps its own weight."""
    one, two = adapter(1, (3, 4)), adapter(2, (3, 4))
    other = Adapter({"w": (Layer("qr", torch.ones(7), (0.3 * torch.ones(21),)),)})
    lq, qr = mix([(one, 0.5), (other, 0.8), (two, 0.9)], operator="karcher").layers["w"]
    (expected,) = mix([(one, 0.5), (two, 0.9)], operator="karcher").layers["w"]
    assert all(torch.equal(a, b) for a, b in zip(lq.logs, expected.logs, strict=True))
    assert torch.allclose(qr.logs[0], torch.full((21,), 0.24))


def test_karcher_between_opposite_rotations_is_refused():
    half = [Adapter({"w": (Layer("none", None, (torch.tensor([a, 0.0, 0.0]),)),)}) for a in (0.0, math.pi)]
    with pytest.raises(SodaMixError, match="'w'.*half a turn.*lie_sum"):
        mix([(a, 0.5) for a in half], operator="karcher")


@pytest.mark.parametrize("weights", [(1.0, -0.5), (0.0, 0.0), (1.0, -1.0)])
def test_karcher_refuses_weights_that_make_no_shares(weights):
    with pytest.raises(SodaMixError, match="karcher.*lie_sum"):
        mix([(adapter(i, (3,)), w) for i, w in enumerate(weights)], operator="karcher")


@given(seed=SEEDS, weights=st.lists(st.floats(-2, 2), min_size=1, max_size=4), double=st.booleans())
def test_sum_delta_is_the_sum_of_changes(make_layer, seed, weights, double):
    forms = [("lq", (2, 5)), ("svd", (10,)), ("qr", (2, 3)), ("none", (5, 2))]
    w = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w = w if double else w.float()
    bases = {kind: decompose(w, kind) for kind in ("lq", "svd", "qr")}
    layers = [make_layer(kind, (6, 10), sizes, seed + i) for i, (kind, sizes) in enumerate(forms)]
    parts = [(Adapter({"w": (layer,)}), weight) for layer, weight in zip(layers, weights, strict=False)]
    expected = w.double() + sum(s * (adapt(w, a.layers["w"], bases).double() - w.double()) for a, s in parts)
    got = sum_delta(w, "w", parts, bases)
    assert got.dtype == w.dtype
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-12 if double else 4e-6)


def test_sum_delta_leaves_a_layer_that_no_adapter_has():
    w = torch.randn(6, 10)
    assert sum_delta(w, "elsewhere", [(adapter(1, (10,)), 1.0)], {}) is w


def test_sum_delta_makes_no_file_and_says_what_to_do():
    with pytest.raises(SodaMixError, match="no small form.*soda.mixing.sum_delta.*lie_sum"):
        mix([(adapter(1, (3,)), 1.0)], operator="sum_delta")


@pytest.mark.parametrize("operator", ["ties", "dare"])
@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, math.nan])
def test_a_density_is_a_share(operator, density):
    with pytest.raises(SodaMixError, match="density"):
        mix([(adapter(1, (3,)), 1.0)], operator=operator, density=density)


def test_unknown_operators_and_settings_are_refused():
    with pytest.raises(SodaMixError, match="'slerp'.*lie_sum, karcher, ties, dare"):
        mix([(adapter(1, (3,)), 1.0)], operator="slerp")
    with pytest.raises(SodaMixError, match="ties has no setting 'seed'; it has density"):
        mix([(adapter(1, (3,)), 1.0)], operator="ties", seed=1)
    with pytest.raises(SodaMixError, match="lie_sum has no setting 'density'; it has none"):
        mix([(adapter(1, (3,)), 1.0)], density=0.5)


@pytest.mark.parametrize("operator", ["ties", "karcher"])
def test_a_mix_of_unlike_forms_is_no_part_of_an_operator_that_is_not_linear(operator):
    both = mix([(adapter(1, (3, 4)), 1.0), (Adapter({"w": (Layer("svd", torch.ones(7), (torch.ones(66),)),)}), 1.0)])
    with pytest.raises(SodaMixError, match=f"itself a mix.*{operator}"):
        mix([(both, 1.0), (adapter(2, (3, 4)), 1.0)], operator=operator)
    assert len(mix([(both, 1.0), (adapter(2, (3, 4)), 1.0)], operator="dare").layers["w"]) == 2
