"""A run's settings, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import SodaTrainingError
from .schedule import SHAPES, Schedule
from .timesteps import Timesteps

Loss = Literal["plain", "dco"]
# name -> least and most that make sense
RANGES = {
    "steps": (1, math.inf),
    "batch_size": (1, math.inf),
    "warm_up": (0, 1),
    "spectrum_rate": (0, 1000),
    "text_encoder_rate": (0, 1000),
    "accumulation": (1, 10_000),
    "gradient_clip": (0, math.inf),
    "ema": (0, 0.99999),
    "checkpoint_every": (1, math.inf),
    "min_snr_gamma": (0, math.inf),
    "caption_dropout": (0, 1),
    "noise_offset": (0, 1),
    "prior_weight": (0, 1000),
}


@dataclass(frozen=True)
class TrainingSettings:
    """Rates are per step, in radians for the factors and in units of the spectrum for the deltas; 1e-2 suits runs of
    some hundred steps (the paper's 5e-5 is for thousands).

    spectrum_rate: the deltas' rate over that of the factors. text_encoder_rate: a text encoder's rates over those of
    the diffusion model, 0 where it is not trained. warm_up: share of the steps. accumulation: batches per step.
    gradient_clip: largest norm of all gradients together, 0 for none. ema: decay per step of the average that is
    returned, 0 for the last weights. checkpoint_every: steps. beta: of `dco`. min_snr_gamma: 0 for none.
    caption_dropout: chance of an empty caption. noise_offset: size of the noise that a whole channel shares.
    prior_weight: of the error on prior data, where there is some.
    """

    steps: int = 200
    learning_rate: float = 1e-2
    batch_size: int = 4
    seed: int = 0
    schedule: Schedule = "cosine"
    warm_up: float = 0.05
    spectrum_rate: float = 1.0
    accumulation: int = 1
    gradient_clip: float = 1.0
    ema: float = 0.0
    checkpoint_every: int = 100
    loss: Loss = "plain"
    beta: float = 1000.0
    min_snr_gamma: float = 0.0
    timesteps: Timesteps = Timesteps()
    caption_dropout: float = 0.0
    noise_offset: float = 0.0
    prior_weight: float = 1.0
    text_encoder_rate: float = 0.0

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            if not least <= getattr(self, name) <= most:
                raise SodaTrainingError(
                    f"{name} is {getattr(self, name)}; give "
                    + (f"at least {least}" if most == math.inf else f"{least} to {most}")
                )
        for name, like in (("learning_rate", 0.01), ("beta", 1000)):
            if not 0 < getattr(self, name) < math.inf:
                raise SodaTrainingError(f"{name} is {getattr(self, name)}; give a positive number, such as {like}")
        for name, known in (("schedule", tuple(SHAPES)), ("loss", get_args(Loss))):
            if getattr(self, name) not in known:
                raise SodaTrainingError(f"{name} is {getattr(self, name)!r}; give one of {', '.join(known)}")
