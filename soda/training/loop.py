"""The training loop: steps until the last one or until asked to stop, checkpoints on the way and at any end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor

from .run import Diverged, Losses, TrainingRun

Batch = TypeVar("Batch")
Keep = Callable[[dict[str, Any]], None]


class Progress(Protocol):
    """Whoever watches a run."""

    def step(self, step: int, loss: float) -> None:
        """After each step, counted from 0. A run that went back counts on from there."""

    def note(self, text: str) -> None:
        """A sentence for the user."""

    def stop_requested(self) -> bool:
        """Asked once per step; True ends the training with the weights as they are."""


class Unwatched:
    """Runs to its end in silence."""

    def step(self, step: int, loss: float) -> None: ...

    def note(self, text: str) -> None: ...

    def stop_requested(self) -> bool:
        return False


def train(
    run: TrainingRun,
    batch_of: Callable[[int], Batch],
    losses_of: Callable[[Mapping[str, Tensor], Batch], Losses],
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> list[float]:
    """Take `run` on to its last step; returns the loss of every step. The parameters end as the run's average, if any.

    `batch_of` and `losses_of` as in `TrainingRun.advance`. `keep(state)` is handed the run's state every
    `checkpoint_every` steps, and when the run is stopped, interrupted or fails, whose exception then passes through.
    Raises `Diverged`.
    """
    settings, progress = run.settings, progress or Unwatched()
    try:
        while run.step < settings.steps:
            trouble = run.advance(batch_of, losses_of)
            if trouble:
                progress.note(run.retreat(trouble))
                continue
            progress.step(run.step - 1, run.losses[-1])
            if progress.stop_requested():
                break
            if keep is not None and run.step % settings.checkpoint_every == 0 and run.step < settings.steps:
                keep(run.state_dict())
    except Diverged:
        raise
    except BaseException:
        if keep is not None:
            keep(run.state_dict())
        raise
    if keep is not None and run.step < settings.steps:
        keep(run.state_dict())
    if run.step == settings.steps and run.guard.bad:
        progress.note(f"The loss ended far above where it was: lower the learning rate ({settings.learning_rate:g}).")
    if run.average is not None:
        run.average.write()
    return run.losses
