"""At which noise levels a model is trained.

A level is a number p in (0, 1): 0 is pure noise, 1 the picture, as ComfyUI counts the way of its samplers. A batch of
B takes the quantiles (i + shift) / B of a distribution in random order, with one random shift: spread evenly, which
steadies the loss of small batches.

    even          p = q
    logit-normal  1 - p = sigmoid(mean + std Phi^-1(1 - q))     (arXiv 2403.03206; mean 0, std 1: the middle)
    shifted       1 - p = s t / (1 + (s - 1) t), t = 1 - q      (the same; s > 1: more noise)
    uniform       p drawn for every picture by itself
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import SodaTrainingError

Kind = Literal["even", "uniform", "logit-normal", "shifted"]
END = 1e-4  # from both ends, where noise levels are infinite or 0


@dataclass(frozen=True)
class Timesteps:
    """A distribution of noise levels; `mean` and `std` are those of logit-normal, `shift` that of shifted."""

    kind: Kind = "even"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 3.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise SodaTrainingError(f"timesteps are {self.kind!r}; give one of {', '.join(get_args(Kind))}")
        if not math.isfinite(self.mean):
            raise SodaTrainingError(f"the mean of the timesteps is {self.mean}; give a number, such as 0")
        for name in ("std", "shift"):
            if not 0 < getattr(self, name) < math.inf:
                raise SodaTrainingError(f"the {name} of the timesteps is {getattr(self, name)}; give more than 0")

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` levels p, fp64 on the CPU."""
        if self.kind == "uniform":
            return torch.rand(count, generator=generator, dtype=torch.float64).clamp(END, 1.0 - END)
        shift = torch.rand((), generator=generator, dtype=torch.float64)
        order = torch.randperm(count, generator=generator).double()
        even = ((order + shift) / count).clamp(END, 1.0 - END)
        if self.kind == "even":
            return even
        if self.kind == "logit-normal":
            noise = torch.sigmoid(self.mean + self.std * torch.special.ndtri(1 - even))
        else:
            noise = self.shift * (1 - even) / (1 + (self.shift - 1) * (1 - even))
        return (1 - noise).clamp(END, 1.0 - END)
