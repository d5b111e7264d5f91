"""Adapters with weights in, one adapter out, by the operator named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature

from ..adapter import Adapter, Layer
from ..errors import SodaMixError
from .blocks import check_weight
from .karcher import karcher
from .lie import dare, lie_sum, ties
from .record import describe, title
from .terms import Part, terms_by_layer
from .together import alike, summed

Operator = Callable[..., dict[str, tuple[Layer, ...]]]  # (terms by layer; settings by keyword) -> the mixed layers
OPERATORS: dict[str, Operator] = {"lie_sum": lie_sum, "karcher": karcher, "ties": ties, "dare": dare}
LINEAR = ("lie_sum", "dare")  # the only ones that know what to do with several terms of one adapter in a layer


def mix(parts: Sequence[Part], name: str = "", operator: str = "lie_sum", **settings: float) -> Adapter:
    """Adapters, each with a weight, as one adapter; a single one at weight 1 is returned as it is where that is exact.

    settings: `density` for ties and dare, `seed` for dare.
    Raises SodaMixError if there is nothing to mix, an operator or setting is unknown, a weight is not finite or names
    a block that the adapter lacks, spectra differ in length, or the operator refuses (see the package's table).
    """
    rule = _rule(operator, settings)
    if not parts:
        raise SodaMixError("there is no adapter to mix; give at least one")
    for adapter, weight in parts:
        check_weight(adapter, weight)
        single, reason = adapter.is_single_form()
        if operator not in LINEAR and not single:
            raise SodaMixError(f"{adapter.name!r} is itself a mix ({reason}): {operator} cannot mix it; use lie_sum")
    if len(parts) == 1 and parts[0][1] == 1 and operator in ("lie_sum", "karcher"):
        return parts[0][0]
    heard = [(adapter, weight) for adapter, weight in parts if weight != 0] or parts
    layers = summed(heard) if operator == "lie_sum" and alike(heard) else rule(terms_by_layer(parts))
    return Adapter(layers, describe(parts, operator, settings), name or title(parts))


def _rule(operator: str, settings: dict[str, float]) -> Operator:
    """The operator with its settings."""
    if operator == "sum_delta":
        raise SodaMixError(
            "sum_delta has no small form, so that it makes no adapter and no SODA file; apply it to the weights with "
            "soda.mixing.sum_delta and save the whole model, or mix with lie_sum"
        )
    if operator not in OPERATORS:
        raise SodaMixError(f"unknown operator {operator!r}; known are {', '.join(OPERATORS)}")
    rule = OPERATORS[operator]
    known = [key for key, value in signature(rule).parameters.items() if value.kind is value.KEYWORD_ONLY]
    for key in settings:
        if key not in known:
            raise SodaMixError(f"{operator} has no setting {key!r}; it has {', '.join(known) or 'none'}")
    return partial(rule, **settings)
