"""A model's own weights loaded for training, and the model given back as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from .prompt_cache import forget_around_runs


@contextlib.contextmanager
def trainable(models: Iterable[ModelPatcher]) -> Iterator[list[ModelPatcher]]:
    """A clone of each model to load for training, on the same weights; unloaded at the end where it has to be.

    A model with dynamic VRAM casts weights into buffers that the next layer reuses, which a backward pass cannot
    bear; as plain ModelPatchers the same weights are loaded whole, or layer by layer into tensors of their own.
    """
    with contextlib.ExitStack() as stack:
        clones = [stack.enter_context(_plain(model)) if model.is_dynamic() else model.clone() for model in models]
        for clone in clones:
            forget_around_runs(clone)
        yield clones


@contextlib.contextmanager
def _plain(model: ModelPatcher) -> Iterator[ModelPatcher]:
    """Every weight's place in the dynamic memory is out of sight meanwhile: it may hold the weight with the patches of
    another clone, and stays valid as far as ComfyUI knows, which keeps no account of who else loads the model."""
    comfy.model_management.unload_model_and_clones(model)
    places = [(module, module._v) for module in model.model.modules() if hasattr(module, "_v")]
    for module, _ in places:
        del module._v
    clone = model.clone(disable_dynamic=True, model_override=model.get_clone_model_override())
    try:
        yield clone
    finally:
        with torch.inference_mode():  # as weights were loaded: moved outside it they would be tensors of neither kind
            comfy.model_management.unload_model_and_clones(clone)
        for module, place in places:
            module._v, module._v_signature = place, None


@contextlib.contextmanager
def training_state(patchers: Iterable[ModelPatcher]) -> Iterator[None]:
    """ComfyUI told that models train; its flags and the patchers' run state put back at the end."""
    patchers, before = list(patchers), comfy.model_management.in_training
    comfy.model_management.in_training = True
    for patcher in patchers:
        patcher.pre_run()
    try:
        yield
    finally:
        comfy.model_management.in_training = before
        with torch.inference_mode():
            for patcher in patchers:
                patcher.cleanup()
