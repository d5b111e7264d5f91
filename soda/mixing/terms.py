"""What is mixed in a layer: the terms of all adapters that have it, with their weights, in an order of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ..adapter import Adapter, Decomposition, Layer
from ..errors import SodaMixError
from .blocks import Weight, layer_weight

Part = tuple[Adapter, Weight]
# (tensors of equal length, fp64; their weights) -> one such tensor
Rule = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
# (terms that turn a side by equal factor sizes, j) -> the triangle of A_j of all of them together, fp32
Rotation = Callable[[Sequence["Term"], int], Tensor]
Turn = tuple[str, tuple[int, ...]]  # side, factor sizes


class Term(NamedTuple):
    """A layer of one adapter, its weight there and the adapter's content hash."""

    layer: Layer
    weight: float
    source: str


TermsByLayer = Mapping[str, Sequence[Term]]


def terms_by_layer(parts: Sequence[Part]) -> dict[str, list[Term]]:
    """Layers in the order of their names, terms in the order of content hashes, so that no order given matters.

    A term of weight 0 has no say, not even in the form, unless all weights are 0.
    """
    found: dict[str, list[Term]] = {}
    for adapter, weight in parts:
        for name, layers in adapter.layers.items():
            w = layer_weight(weight, name)
            found.setdefault(name, []).extend(Term(layer, w, adapter.content_hash) for layer in layers)
    heard = {name: kept for name, terms in found.items() if (kept := [term for term in terms if term.weight])}
    return {
        name: sorted(terms, key=lambda term: (term.source, term.weight))
        for name, terms in sorted((heard or found).items())
    }


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum w_i t_i, from the first to the last."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + tensor * weight
    return total


def turns(terms: Sequence[Term]) -> dict[Turn, list[Term]]:
    """The terms by the side of the weight that they turn and their factor sizes."""
    found: dict[Turn, list[Term]] = {}
    for term in terms:
        found.setdefault((term.layer.side, term.layer.sizes), []).append(term)
    return found


def combine(name: str, terms: Sequence[Term], spectrum: Rule, rotation: Rotation) -> tuple[Layer, ...]:
    """The layer as one term per form, its spectra by one rule and its rotations by another.

    Spectra combine within a form: each belongs to its basis. Rotations combine over all terms that turn one side of
    the weight by equal factor sizes, factor by factor; the first of their forms carries the result, the others do not
    turn, and a `none` that does not turn is left out.
    Raises SodaMixError if spectra of one form differ in length.
    """
    forms: dict[tuple[Decomposition, tuple[int, ...]], list[Term]] = {}
    for term in terms:
        forms.setdefault((term.layer.decomposition, term.layer.sizes), []).append(term)
    unturned, layers = turns(terms), []
    for decomposition, sizes in sorted(forms, key=lambda form: (form[0] == "none", form)):
        same = forms[decomposition, sizes]
        turning = unturned.pop((same[0].layer.side, sizes), None)
        if turning is None and decomposition == "none":
            continue
        logs = tuple(
            rotation(turning, j) if turning else log.new_zeros(log.shape) for j, log in enumerate(same[0].layer.logs)
        )
        deltas = [term.layer.delta for term in same if term.layer.delta is not None]
        lengths = sorted({delta.numel() for delta in deltas})
        if len(lengths) > 1:
            raise SodaMixError(
                f"layer {name!r}: spectra of {' and '.join(map(str, lengths))} numbers do not mix; they belong to "
                "models of unlike architecture"
            )
        sketches = [term.layer.sketch for term in same if term.layer.sketch is not None]
        layers.append(
            Layer(
                decomposition,
                apply(spectrum, same, deltas) if deltas else None,
                logs,
                apply(weighted_sum, same, sketches) if len(sketches) == len(same) else None,
            )
        )
    return tuple(layers)


def apply(rule: Rule, terms: Sequence[Term], tensors: Sequence[Tensor]) -> Tensor:
    """The rule in fp64 on one tensor of each term, as fp32."""
    return rule([tensor.double() for tensor in tensors], [term.weight for term in terms]).float()


def each_factor(rule: Rule) -> Rotation:
    """The rule on the triangles of A_j."""
    return lambda turning, j: apply(rule, turning, [term.layer.logs[j] for term in turning])


def common_turn(name: str, terms: Sequence[Term], operator: str) -> None:
    """Raises SodaMixError if the terms turn a side of the weight by unlike factor sizes."""
    for side in ("input", "output"):
        sizes = sorted({term.layer.sizes for term in terms if term.layer.side == side})
        if len(sizes) > 1:
            raise SodaMixError(
                f"layer {name!r}: {operator} needs equal factor sizes, these adapters have "
                f"{' and '.join(map(str, sizes))}; mix them with lie_sum"
            )
