"""Activations computed again in the backward pass instead of kept: a third more arithmetic for far less memory.

torch.utils.checkpoint does the same, but what a network writes in place after it was saved goes wrong there without a
word: its hooks skip torch's own check. Here such a change raises torch's error, and within `copying` it does no harm.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

ROW = 16  # numbers
INPLACE = "modified by an inplace operation"
_copies = False
_within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@contextlib.contextmanager
def copying() -> Iterator[None]:
    """Within it, what is computed again is kept as copies, for networks that write into their activations."""
    global _copies
    before, _copies = _copies, True
    try:
        yield
    finally:
        _copies = before


@contextlib.contextmanager
def again_within(context: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
    """Within it, what is computed again is so within context(): a backward pass knows no mode of its forward pass."""
    global _within
    before, _within = _within, context
    try:
        yield
    finally:
        _within = before


def recomputed(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """run(*args, **kwargs), of which a backward pass keeps the arguments alone.

    `run` must give the same twice and draw nothing at random. Dictionaries among the arguments are kept as they are
    now. Raises RuntimeError in the backward pass if a tensor that it needs was changed in place meanwhile.
    """
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    frame = _Frame(run, args, kwargs)
    with saved_tensors_hooks(frame.pack, frame.unpack):
        return run(*args, **kwargs)


class _Handle:
    """Stands for a saved tensor; dies with the node that saved it."""


class _Frame:
    """One call: its arguments until it is computed again, then what that saved."""

    def __init__(self, run: Callable[..., Any], args: tuple, kwargs: dict[str, Any]):
        self.run, self.copies, self.within = run, _copies, _within
        self.arguments: Any = _held((args, kwargs), self.copies)
        self.handles: list[weakref.ref[_Handle]] = []
        self.tensors: weakref.WeakKeyDictionary[_Handle, _Kept] = weakref.WeakKeyDictionary()

    def pack(self, _: Tensor) -> _Handle:
        handle = _Handle()
        self.handles.append(weakref.ref(handle))
        return handle

    def unpack(self, handle: _Handle) -> Tensor:
        if self.arguments is not None:
            self._again()
        return self.tensors[handle].tensor()

    def _again(self) -> None:
        held, self.arguments = self.arguments, None
        places = iter(self.handles)

        def keep(tensor: Tensor) -> None:
            handle = next(places)()
            if handle is not None:
                self.tensors[handle] = _Kept(tensor.detach(), self.copies)

        with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(keep, _never), self.within():
            args, kwargs = _given(held)
            self.run(*args, **kwargs)
        self.handles = []


class _Kept:
    """A tensor as it was, or a look at it that notices changes."""

    def __init__(self, tensor: Tensor, copied: bool):
        self.kept = _copy(tensor.detach()) if copied else tensor
        self.version = _version(self.kept)
        self.copied, self.requires_grad = copied, tensor.requires_grad

    def tensor(self) -> Tensor:
        if _version(self.kept) != self.version:
            raise RuntimeError(
                f"one of the variables needed for gradient computation has been {INPLACE}: a tensor of shape "
                f"{tuple(self.kept.shape)} in a block that is computed again"
            )
        return self.kept

    def argument(self) -> Tensor:
        """For a run that may write into it: no leaf."""
        tensor = self.tensor()
        return tensor.requires_grad_().clone() if self.copied and self.requires_grad else tensor


def _copy(tensor: Tensor) -> Tensor:
    """Laid out alike in memory: what is expanded stays so, and rows that begin at multiples of 16 numbers go on to do
    so, as those of the mask that torch hands its attention's backward pass must on a GPU."""
    own = tensor
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            own = own.narrow(dim, 0, 1)
    padded = own.dim() > 1 and own.stride(-1) == 1 and own.shape[-1] % ROW and own.stride(-2) % ROW == 0
    if padded:
        place = own.new_empty(*own.shape[:-1], -(-own.shape[-1] // ROW) * ROW)[..., : own.shape[-1]]
    return (place.copy_(own) if padded else own.clone()).expand_as(tensor)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _held(value: Any, copied: bool) -> Any:
    if isinstance(value, Tensor):
        return _Kept(value, copied)
    return _mapped(lambda item: _held(item, copied), value)


def _given(value: Any) -> Any:
    if isinstance(value, _Kept):
        return value.argument()
    return _mapped(_given, value)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Plain dicts, lists and tuples with all that they hold changed; anything else as it is."""
    if type(value) is dict:
        return {key: change(item) for key, item in value.items()}
    return type(value)(map(change, value)) if type(value) in (list, tuple) else value


def _never(_: Any) -> Tensor:
    raise RuntimeError("a block computed again is differentiated through its first run")
