"""Objectives as functions of the model's squared errors, which a host computes.

The plain objective is their mean. All functions are pure and differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dco(error: Tensor, reference: Tensor, beta: float) -> Tensor:
    """-log sigmoid(-beta (error - reference)): direct consistency optimisation (arXiv 2402.12004).

    The mean errors, scalars, of the adapted and of the frozen model on the same batch and noise. What the frozen model
    does as well is left alone, so that an adapter changes no more than it needs to. log 2 without an adapter.
    """
    return -torch.nn.functional.logsigmoid(-beta * (error - reference))


def min_snr(snr: Tensor, c: Tensor, gamma: float) -> Tensor:
    """Weights min(SNR, gamma) c^2 of the squared errors of a model's output (arXiv 2303.09556).

    c is the output's factor in the denoised sample, so that the error of the sample itself counts min(SNR, gamma):
    min(SNR, gamma) / SNR for a noise prediction, min(SNR, gamma) / (SNR + 1) for a velocity.
    """
    return snr.clamp(max=gamma) * c.square()
