"""Networks that keep the prompt's keys and values from one step for the next (HiDream-O1).

They know them by the prompt alone: under other weights they would be met again, those of the base by its adapter and
those of the adapter by the base.
"""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP

NAME = "soda"


def forget(patcher: ModelPatcher, *_) -> None:
    """Now; nothing where the network keeps none."""
    clear = getattr(getattr(patcher.model, "diffusion_model", None), "clear_kv_cache", None)
    if clear is not None:
        clear()


def forget_around_runs(patcher: ModelPatcher) -> None:
    """Whenever a run with this patcher, of a sampler or of a training, begins or ends."""
    for moment in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_CLEANUP):
        patcher.remove_callbacks_with_key(moment, NAME)
        patcher.add_callback_with_key(moment, NAME, forget)
