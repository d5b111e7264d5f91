"""What ComfyUI's networks lack to be trained through: they are written for sampling, where nothing is differentiated.

Some add to their residual stream in place, which destroys what the backward pass of the norm before it needs, or into
a tensor given as `out`, through which torch passes no gradient; some call fused kernels of comfy_kitchen that have no
derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import lru_cache
from typing import TypeVar

import torch
from torch import library
from torch.overrides import TorchFunctionMode

from ...training.recompute import INPLACE, again_within, copying

Result = TypeVar("Result")
OUT = "don't support automatic differentiation"
FUSED = (
    "apply_rope", "apply_rope1", "apply_rope_split_half", "apply_rope_split_half1", "rms_rope", "rms_rope1",
    "rms_rope_split_half", "rms_rope_split_half1",
)  # fmt: skip


def differentiated(run: Callable[[], Result]) -> Result:
    """run(), of which the first backward pass comes before any change of state.

    A network that writes into its residual stream makes that pass fail; then all starts again with a remedy: a copy
    kept of whatever a backward pass needs, or results in tensors of their own. Copies cost memory, and both every
    operation of the host some microseconds, so that other networks go without.
    """
    _register_derivatives()
    remedies: dict[str, Callable[[], AbstractContextManager]] = {INPLACE: _copies, OUT: _results}
    with ExitStack() as stack:
        while True:
            try:
                return run()
            except RuntimeError as error:
                trouble = next((words for words in remedies if words in str(error)), None)
                if trouble is None:
                    raise
            stack.enter_context(remedies.pop(trouble)())


@contextmanager
def _copies() -> Iterator[None]:
    with copying(), torch.autograd.graph.allow_mutation_on_saved_tensors():
        yield


@contextmanager
def _results() -> Iterator[None]:
    with again_within(_ResultsOfTheirOwn), _ResultsOfTheirOwn():
        yield


class _ResultsOfTheirOwn(TorchFunctionMode):
    """f(..., out=tensor) is f(...) where gradients are wanted; what it gives is what networks go on with."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and kwargs.get("out") is not None:
            kwargs = {name: value for name, value in kwargs.items() if name != "out"}
        return func(*args, **kwargs)


@lru_cache(maxsize=1)
def _register_derivatives() -> None:
    """Derivatives of the fused kernels: those of the same formulas in plain torch, which comfy_kitchen has as well."""
    try:
        from comfy_kitchen.backends.eager import rope
    except ImportError:  # then ComfyUI has no such kernel either
        return
    for name in FUSED:
        if hasattr(rope, name) and hasattr(torch.ops.comfy_kitchen, name):
            library.register_autograd(
                f"comfy_kitchen::{name}", _backward(getattr(rope, name)), setup_context=_keep_inputs
            )


def _keep_inputs(ctx, inputs: tuple, output) -> None:
    ctx.others = [None if isinstance(value, torch.Tensor) else value for value in inputs]
    ctx.places = [place for place, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
    ctx.save_for_backward(*(inputs[place] for place in ctx.places))


def _backward(formula: Callable) -> Callable:
    def backward(ctx, *gradients):
        inputs = list(ctx.others)
        with torch.enable_grad():
            for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
                inputs[place] = tensor.detach().requires_grad_(ctx.needs_input_grad[place])
            outputs = formula(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [place for place in ctx.places if ctx.needs_input_grad[place]]
        found = torch.autograd.grad(outputs, [inputs[place] for place in wanted], gradients)
        result: list = [None] * len(inputs)
        for place, gradient in zip(wanted, found, strict=True):
            result[place] = gradient
        return tuple(result)

    return backward
