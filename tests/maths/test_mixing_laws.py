"""The table in soda.mixing's docstring, cell by cell: what holds holds, what does not does not, what is refused is."""

import itertools
from dataclasses import replace

import pytest
import torch

import soda.mixing
from soda.adapt import adapt
from soda.adapter import Adapter
from soda.decomposition import decompose, spectral_change
from soda.errors import SodaMixError
from soda.fingerprint import sketch
from soda.mixing import OPERATORS, mix, sum_delta

SHAPE, SIZES = (12, 18), {"lq": (2, 3, 3), "svd": (2, 3, 3), "qr": (2, 2, 3), "none": (2, 3, 3)}
W = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
BASES = {kind: decompose(W, kind) for kind in ("lq", "svd", "qr")}


def table():
    """(law, operator) -> yes, no, refused or -."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in soda.mixing.__doc__.splitlines()
        if line.startswith("|")
    ]
    head, _, *laws = rows
    return {(law, operator): cell for law, *cells in laws for operator, cell in zip(head[1:], cells, strict=True)}


TABLE = table()


@pytest.fixture(scope="module")
def one_of(make_layer):
    """one_of(seed, kind, sizes) -> an adapter of W with sketches of its own."""

    def make(seed, kind="lq", sizes=None):
        layer = make_layer(kind, SHAPE, sizes or SIZES[kind], seed, angle=0.4)
        if layer.delta is not None:
            layer = replace(layer, sketch=sketch(spectral_change(BASES[kind], layer.delta, W)))
        return Adapter({"w": (layer,)}, {}, f"{kind} {seed}")

    return make


def weight(operator, parts, **settings):
    if operator == "sum_delta":
        return sum_delta(W, "w", parts, BASES)
    return adapt(W, mix(parts, operator=operator, **settings).layers["w"], BASES)


def alone(adapter, strength=1.0):
    return adapt(W, [term.scaled(strength) for term in adapter.layers["w"]], BASES)


def close(one, two, atol=2e-6):
    return torch.allclose(one, two, rtol=0, atol=atol)


class Laws:
    """Each takes the operator's name and makes of adapters, and says whether the law holds."""

    def identity(operator, one_of):
        return weight(operator, [(one_of(1), 0.0), (one_of(2), 0.0)]) is W

    def recovery(operator, one_of, **settings):
        one, two = one_of(1), one_of(2)
        orders = ([(one, 1.0), (two, 0.0)], [(two, 0.0), (one, 1.0)], [(one, 1.0)])
        return all(torch.equal(weight(operator, parts, **settings), alone(one)) for parts in orders)

    def full_density(operator, one_of):
        return Laws.recovery(operator, one_of, density=1.0)

    def repetition(operator, one_of):
        one = one_of(1)
        return close(weight(operator, [(one, 0.25), (one, 0.75)]), weight(operator, [(one, 1.0)]))

    def strength(operator, one_of):
        one = one_of(1)
        whole = one if operator == "sum_delta" else mix([(one, 1.0)], operator=operator)
        return all(close(weight(operator, [(one, s)]), alone(whole, s)) for s in (0.5, 1.7))

    def negative(operator, one_of):
        return bool(weight(operator, [(one_of(1), 1.0), (one_of(2), -0.5)]).isfinite().all())

    def order(operator, one_of):
        parts = [(one_of(1), 0.4), (one_of(2), 0.3), (one_of(2), 0.7), (one_of(3), 1.1)]
        first = weight(operator, parts)
        return all(torch.equal(weight(operator, again), first) for again in itertools.permutations(parts))

    def orthogonality(operator, one_of):
        parts = [(one_of(seed, "none"), w) for seed, w in ((1, 0.9), (2, 1.6))]
        turned = weight(operator, parts)
        assert not close(turned, W, 0.1)
        return close(torch.linalg.svdvals(turned), torch.linalg.svdvals(W))

    def spectrum(operator, one_of):
        parts = [(one_of(1), 0.9), (one_of(2), 1.6)]
        change = sum(w * spectral_change(BASES["lq"], a.layers["w"][0].delta.double(), W) for a, w in parts)
        return close(torch.linalg.svdvals(weight(operator, parts)), torch.linalg.svdvals(W + change))

    def size(operator, one_of):
        one = one_of(1)
        mixed = mix([(one, 0.5), (one_of(2), 0.5), (one_of(3), 0.8)], operator=operator)
        (term,), (part,) = mixed.layers["w"], one.layers["w"]
        return mixed.is_single_form()[0] and (term.decomposition, term.sizes) == (part.decomposition, part.sizes)

    def sketch(operator, one_of):
        (term,) = mix([(one_of(1), 0.6), (one_of(2), 1.2)], operator=operator).layers["w"]
        own = sketch(spectral_change(BASES["lq"], term.delta, W))
        return term.sketch is not None and torch.allclose(term.sketch, own, atol=1e-5)

    def unlike_bases(operator, one_of):
        parts = [(one_of(1, "lq"), 0.6), (one_of(2, "svd"), 0.7), (one_of(3, "qr"), 0.8)]
        if operator != "sum_delta":
            mixed = mix(parts, operator=operator)
            assert [term.decomposition for term in mixed.layers["w"]] == ["lq", "qr", "svd"]
            assert not mixed.is_single_form()[0]
            assert not any(log.count_nonzero() for log in mixed.layers["w"][2].logs)  # lq turns for both
        return not close(weight(operator, parts), weight(operator, parts[:2]), 0.01)

    def unlike_sizes(operator, one_of):
        parts = [(one_of(1), 0.6), (one_of(2, "lq", (3, 6)), 0.7)]
        if operator != "sum_delta":
            assert not mix(parts, operator=operator).is_single_form()[0]
        return not close(weight(operator, parts), weight(operator, parts[:1]), 0.01)


@pytest.mark.parametrize(("law", "operator"), [cell for cell, value in TABLE.items() if value != "-"])
def test_what_the_table_says(law, operator, one_of):
    check, expected = getattr(Laws, law.replace(" ", "_")), TABLE[law, operator]
    if expected == "refused":
        with pytest.raises(SodaMixError):
            check(operator, one_of)
    else:
        assert check(operator, one_of) == (expected == "yes")


def test_the_table_is_whole():
    laws = {name.replace("_", " ") for name in vars(Laws) if not name.startswith("__")}
    assert {law for law, _ in TABLE} == laws
    assert {operator for _, operator in TABLE} == {*OPERATORS, "sum_delta"}
    assert set(TABLE.values()) == {"yes", "no", "refused", "-"}
