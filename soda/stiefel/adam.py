"""Adam on Stiefel manifolds: element-wise second moments of the tangent gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .geometry import hold, tangent_gradient
from .optimizer import StiefelOptimizer


class StiefelAdam(StiefelOptimizer):
    """Adam on matrices with orthonormal columns; parameters are fp32 or fp64 `(..., n, m)`, n >= m.

    With Z, W, the retraction and the metric's `a` of `geometry`, o and / element by element:

        Y  <- b1 Y - (1 - b1) Z                                   skew: momentum that needs no transport
        p  <- b2 p + (1 - b2) Z o Z                               symmetric, so that xi stays skew
        xi  = lr / (1 - b1^t) Y / (sqrt(p / (1 - b2^t)) + eps)    held at MAX_STEP

    and for n > m

        V  <- b1 V + (3 a - 2) / 2 V xi - (1 - b1) W              normal to X
        q  <- b2 q + (1 - b2) W o W
        zeta = (I - X X^T) lr / (1 - b1^t) V / (sqrt(q / (1 - b2^t)) + eps)    held at MAX_STEP

    Rates are in radians: each entry of xi is about lr at most while the gradient keeps its sign. The products of V
    with xi do no work (tr V^T V xi = 0); their factor is the paper's, the variational one would be 2 a - 1. The
    authors' program has V Y for V xi / lr with the opposite sign, and no bias correction of V.

    The moments in `state` are of the gradient, -Y and -V. Raises ValueError as `StiefelOptimizer` says.
    """

    MOMENTS = ("momentum", "second_moment")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        a: float = 0.5,
        retraction: str = "polar",
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "a": a, "retraction": retraction})

    def _check_settings(self, group: dict[str, Any]) -> None:
        super()._check_settings(group)
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas are {group['betas']}; give two numbers from 0 up to but not including 1")
        if not group["eps"] > 0:
            raise ValueError(f"eps is {group['eps']}; give more than 0, because the diagonals of Y and p are 0")

    def _tangent(
        self, x: Tensor, g: Tensor, moments: dict[str, Tensor], step: int, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        (b1, b2), a = group["betas"], group["a"]
        z, w = tangent_gradient(x, g, a, self._scratch)
        xi, count = self._scratch.take(0, z, *z.shape).zero_(), z.new_full((), step, dtype=torch.float32)
        torch._fused_adam_(  # Adam's update of 0 by Z is xi
            [xi], [z], [moments["momentum"]], [moments["second_moment"]], [], [count],
            lr=group["lr"], beta1=b1, beta2=b2, weight_decay=0.0, eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip
        hold(xi)
        if w is None:
            return xi, None
        v = moments["normal_momentum"]
        v.copy_(torch.baddbmm(w, v, xi, beta=1 - b1, alpha=(3 * a - 2) / 2).add_(v, alpha=b1))
        root = math.sqrt(1 - b2**step)
        rate, eps = group["lr"] * root / (1 - b1**step), group["eps"] * root
        q = moments["normal_second_moment"].mul_(b2).addcmul_(w, w, value=1 - b2)
        zeta = torch.div(v, q.sqrt().add_(eps)).mul_(-rate)
        return xi, hold(zeta.baddbmm_(x, torch.bmm(x.mT, zeta), alpha=-1))
