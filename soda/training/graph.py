"""Forward and backward passes as CUDA graphs: a step costs its arithmetic, not its thousands of kernel launches."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)
EAGER = 2  # passes of a form before it is recorded: libraries have chosen their kernels, and rare forms stay rare
MOST = 8  # graphs at a time
ATTEMPTS = 2  # the first may meet a library that sets itself up
Passes = Callable[[Any], Tensor]  # a batch -> its losses; adds to the gradients


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    losses: Tensor


class Graphs:
    """graphs(passes, batch) is passes(batch), recorded once for each form of batch and then replayed.

    A batch is a tree of dataclasses, dicts, lists and tuples with tensors in it; its form is all but the numbers in
    the tensors. Whatever else `passes` reads and adds to must keep its place in memory (parameters and their
    gradients, the model's weights; else call `forget`), and it must neither wait for the device nor branch on its
    numbers. What cannot be recorded runs as it is, with a line in the log. All passes run on one stream of their own,
    so that libraries and the allocator know it when it is recorded, the same for all trainings: cuBLAS keeps 65 MiB
    for each stream that it has met. Graphs share their memory: the losses are valid until the next call.
    """

    def __init__(self) -> None:
        self._stream = _stream(torch.cuda.current_device())
        self._met: Counter[str] = Counter()
        self._recorded: dict[str, _Graph] = {}
        self._attempts = ATTEMPTS

    def __call__(self, passes: Passes, batch: Any) -> Tensor:
        outside = torch.cuda.current_stream()
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            losses = self._run(passes, batch)
        outside.wait_stream(self._stream)
        return losses

    def _run(self, passes: Passes, batch: Any) -> Tensor:
        form = _form(batch)
        self._met[form] += 1
        if form not in self._recorded:
            if not self._attempts or self._met[form] <= EAGER or len(self._recorded) == MOST:
                return passes(batch)
            try:
                self._recorded[form] = self._record(passes, batch)
            except RuntimeError as error:
                self._attempts -= 1
                if not self._attempts:
                    log.warning("This training step cannot be recorded as a CUDA graph: %s", error)
            if form not in self._recorded:  # now that the error is gone, and with it the tensors that its frames hold
                return passes(batch)
        recorded = self._recorded[form]
        torch._foreach_copy_(recorded.inputs, _tensors(batch))
        recorded.graph.replay()
        return recorded.losses

    def forget(self) -> None:
        """Give the graphs' memory back, and record anew from the next batch on."""
        self._recorded.clear()

    def _record(self, passes: Passes, batch: Any) -> _Graph:
        held = _mapped(batch, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
        graph = torch.cuda.CUDAGraph()
        pool = next((known.graph.pool() for known in self._recorded.values()), None)
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            losses = passes(held)
        return _Graph(graph, _tensors(held), losses)


@cache
def _stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The tree with `change` of every leaf."""
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([_mapped(value, change) for value in tree])
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: _mapped(getattr(tree, f.name), change) for f in fields(tree)})
    return change(tree)


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(tree, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


def _form(tree: Any) -> str:
    def told(leaf: Any) -> Any:
        return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf

    return repr(_mapped(tree, told))
