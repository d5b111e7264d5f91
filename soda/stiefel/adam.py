"""Adam on Stiefel manifolds: element-wise second moments of the tangent gradient."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .geometry import hold, hold_skew, tangent_gradients
from .optimizer import StiefelOptimizer

SURE_EPS = 1e-12  # below, a Z o Z that underflows in fp32 could leave xi larger than the bound on it


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

    Rates are in radians: each entry of xi is about lr at most while the gradient keeps its sign. It never exceeds

        c = lr sqrt(k (1 - b2^t)) / (1 - b1^t),    k <- b1^2 / b2 k + (1 - b1)^2 / (1 - b2), from 0

    since Y o Y <= k p, by induction with Cauchy and Schwarz: (b1 y + (1 - b1) z)^2 <= (b1^2 / b2 k + (1 - b1)^2 /
    (1 - b2)) (b2 y^2 / k + (1 - b2) z^2). (For the default betas c rises from lr to 7.3 lr, which gradients reach that
    grow tenfold in 22 steps.) Where c is small, xi cannot need holding and few Newton-Schulz steps do, and no GPU is
    asked. k is in the state, as `gain`, so that betas may change.

    The products of V with xi do no work (tr V^T V xi = 0); their factor is the paper's, the variational one would be
    2 a - 1. The authors' program has V Y for V xi / lr with the opposite sign, and no bias correction of V.

    The moments in `state` are of the gradient, -Y and -V. Raises ValueError as `StiefelOptimizer` says.
    """

    MOMENTS = ("momentum", "second_moment")
    COUNTERS = {"step": 0, "gain": 0.0}

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

    def _count(self, counters: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
        b1, b2 = group["betas"]
        gain = b1**2 / max(b2, sys.float_info.min) * counters["gain"] + (1 - b1) ** 2 / (1 - b2)
        return {**super()._count(counters, group), "gain": gain}

    def _tangents(
        self,
        xs: list[Tensor],
        gs: list[Tensor],
        moments: list[dict[str, Tensor]],
        counters: dict[str, Any],
        group: dict[str, Any],
    ) -> tuple[list[Tensor], list[Tensor | None], float]:
        (b1, b2), a, step = group["betas"], group["a"], counters["step"]
        zs, ws = tangent_gradients(xs, gs, a, self._scratch)
        xis = self._scratch.take(0, zs[0], [z.shape for z in zs])
        torch._foreach_zero_(xis)
        torch._fused_adam_(  # Adam's update of 0 by Z is xi
            xis, zs, [m["momentum"] for m in moments], [m["second_moment"] for m in moments], [],
            [zs[0].new_full((), step, dtype=torch.float32)] * len(xis),
            lr=group["lr"], beta1=b1, beta2=b2, weight_decay=0.0, eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip
        entry = math.inf
        if group["eps"] >= SURE_EPS:
            entry = group["lr"] * math.sqrt(counters["gain"] * (1 - b2**step)) / (1 - b1**step)
        zetas: list[Tensor | None] = []
        for x, w, xi, moment in zip(xs, ws, xis, moments, strict=True):
            hold_skew(xi, entry)
            zetas.append(None if w is None else self._normal(x, w, xi, moment, step, group))
        return xis, zetas, entry

    def _normal(
        self, x: Tensor, w: Tensor, xi: Tensor, moments: dict[str, Tensor], step: int, group: dict[str, Any]
    ) -> Tensor:
        (b1, b2), a = group["betas"], group["a"]
        v = moments["normal_momentum"]
        v.copy_(torch.baddbmm(w, v, xi, beta=1 - b1, alpha=(3 * a - 2) / 2).add_(v, alpha=b1))
        root = math.sqrt(1 - b2**step)
        rate, eps = group["lr"] * root / (1 - b1**step), group["eps"] * root
        q = moments["normal_second_moment"].mul_(b2).addcmul_(w, w, value=1 - b2)
        zeta = torch.div(v, q.sqrt().add_(eps)).mul_(-rate)
        return hold(zeta.baddbmm_(x, torch.bmm(x.mT, zeta), alpha=-1))
