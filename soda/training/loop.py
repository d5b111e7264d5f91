"""The training loop: StiefelAdam on the rotations, AdamW on the spectra, one loss per step.

Both rates rise linearly over the first 5 % of the steps and fall to 0 along a half cosine: short runs end in a rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SodaTrainingError
from ..stiefel import StiefelAdam
from .parameters import SodaParameters

WARM_UP = 0.05
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class TrainingSettings:
    """A run's settings. Rates are per step, in radians for the factors and in units of the spectrum for the deltas;
    1e-2 suits runs of some hundred steps (the paper's 5e-5 is for thousands)."""

    steps: int = 200
    learning_rate: float = 1e-2
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise SodaTrainingError(f"{name} is {getattr(self, name)}; give at least {least}")
        if not 0 < self.learning_rate < math.inf:
            raise SodaTrainingError(f"learning_rate is {self.learning_rate}; give a positive number, such as 0.01")


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate at `step`, counted from 0."""
    warm = max(1, round(WARM_UP * steps))
    rise = min(1.0, (step + 1) / warm)
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    parameters: SodaParameters,
    loss_fn: Callable[[Mapping[str, Tensor], int], Tensor],
    settings: TrainingSettings,
    on_step: Callable[[int, float], bool],
) -> list[float]:
    """Train `parameters` in place; returns the loss of every step.

    `loss_fn(weights, step)` gives the scalar loss under the adapted weights; `on_step(step, loss)` is told after each
    step and ends the training by returning True. Whatever either raises passes through. A loss or gradient that is
    not finite raises SodaTrainingError.
    """
    optimizers: list[torch.optim.Optimizer] = []
    if parameters.rotations():
        optimizers.append(StiefelAdam(parameters.rotations(), lr=settings.learning_rate))
    if parameters.spectra():
        optimizers.append(torch.optim.AdamW(parameters.spectra(), lr=settings.learning_rate, weight_decay=0.0))
    trained = [*parameters.rotations(), *parameters.spectra()]
    losses = []
    for step in range(settings.steps):
        loss = loss_fn(parameters(), step)
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * schedule(step, settings.steps)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm.item())):
            raise SodaTrainingError(
                f"the loss is {value} and its gradient {norm.item()} at step {step + 1} of {settings.steps}; lower the "
                f"learning rate ({settings.learning_rate:g}) or check the training images"
            )
        for optimizer in optimizers:
            optimizer.step()
        losses.append(value)
        if on_step(step, value):
            break
    return losses
