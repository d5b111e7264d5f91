"""Forward and backward passes as CUDA graphs: a step costs its arithmetic, not its thousands of kernel launches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)
WARM_UP = 3  # passes before the recording, so that libraries have chosen their kernels and allocated what they keep
MOST = 4  # graphs at a time: batches of more forms than that go without
Passes = Callable[[Any], Tensor]  # a batch -> its losses; adds to the gradients


class _NotRecorded(Exception):
    """From the error that says why."""


class Graphs:
    """graphs(passes, batch) is passes(batch), recorded once for each form of batch and replayed.

    A batch is a tree of dataclasses, dicts, lists and tuples with tensors in it; its form is all but the numbers in
    the tensors. `passes` adds to `gradients`, which are there before it is called. Whatever else it reads must keep
    its place in memory (parameters, the model's weights; else call `forget`), and it must neither wait for the device
    nor branch on its numbers. What cannot be recorded runs as it is, with a line in the log. The losses are valid
    until the next call.
    """

    def __init__(self, gradients: Sequence[Tensor]):
        self._gradients = gradients
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self._works = True

    def __call__(self, passes: Passes, batch: Any) -> Tensor:
        form = tuple(_form(batch))
        if form not in self._recorded:
            if not self._works or len(self._recorded) == MOST:
                return passes(batch)
            before = [gradient.clone() for gradient in self._gradients]
            try:
                self._recorded[form] = _record(passes, batch)
            except _NotRecorded as error:
                log.warning("This training step cannot be recorded as a CUDA graph: %s", error.__cause__)
                self._works = False
            for gradient, kept in zip(self._gradients, before, strict=True):
                gradient.copy_(kept)
            if not self._works:
                return passes(batch)
        graph, inputs, losses = self._recorded[form]
        for held, given in zip(inputs, _tensors(batch), strict=True):
            held.copy_(given, non_blocking=True)
        graph.replay()
        return losses

    def forget(self) -> None:
        """Record anew from the next batch on: something that the graphs read has moved."""
        self._recorded.clear()


def _record(passes: Passes, batch: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
    """The graph, its inputs and its losses."""
    held = _mapped(batch, Tensor.clone)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            passes(held)
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            losses = passes(held)
    except RuntimeError as error:
        raise _NotRecorded from error
    return graph, list(_tensors(held)), losses


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The tree with `change` of every tensor."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(value, change) for value in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: _mapped(getattr(tree, f.name), change) for f in fields(tree)})
    return tree


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from _leaves(value)
    elif isinstance(tree, (list, tuple)):
        yield len(tree)
        for value in tree:
            yield from _leaves(value)
    elif is_dataclass(tree) and not isinstance(tree, type):
        for f in fields(tree):
            yield from _leaves(getattr(tree, f.name))
    else:
        yield tree


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in _leaves(tree) if isinstance(leaf, Tensor))


def _form(tree: Any) -> Iterator[Hashable]:
    """What two batches share that one graph can serve."""
    for leaf in _leaves(tree):
        if isinstance(leaf, Tensor):
            yield (tuple(leaf.shape), leaf.dtype, leaf.device)
        else:
            yield leaf if isinstance(leaf, (str, int, float, bool, type(None))) else id(leaf)
