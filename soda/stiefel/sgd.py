"""Gradient descent with momentum on Stiefel manifolds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .geometry import hold, tangent_gradients
from .optimizer import StiefelOptimizer


class StiefelSGD(StiefelOptimizer):
    """Momentum SGD on matrices with orthonormal columns; parameters are fp32 or fp64 `(..., n, m)`, n >= m.

    With Z, W, the retraction and the metric's `a` of `geometry`, mu the momentum and d the dampening:

        V  <- mu V + (3 a - 2) / 2 lr V Y - (1 - d) W     n > m only; normal to X
        Y  <- mu Y - (1 - d) Z                            skew: momentum that needs no transport
        xi  = lr Y,  zeta = lr V                          each held at MAX_STEP

    The product V Y does no work (tr V^T V Y = 0); its factor is the paper's, the variational one would be 2 a - 1.
    The authors' program has it with the opposite sign.

    The moments in `state` are of the gradient, -Y and -V. Raises ValueError as `StiefelOptimizer` says.
    """

    MOMENTS = ("momentum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        momentum: float = 0.9,
        dampening: float = 0.0,
        *,
        a: float = 0.5,
        retraction: str = "polar",
    ):
        settings = {"lr": lr, "momentum": momentum, "dampening": dampening, "a": a, "retraction": retraction}
        super().__init__(params, settings)

    def _check_settings(self, group: dict[str, Any]) -> None:
        super()._check_settings(group)
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum is {group['momentum']}; give a number from 0 up to but not including 1")
        if not 0 <= group["dampening"] <= 1:
            raise ValueError(f"dampening is {group['dampening']}; give a number from 0 to 1")

    def _tangents(
        self,
        xs: list[Tensor],
        gs: list[Tensor],
        moments: list[dict[str, Tensor]],
        counters: dict[str, Any],
        group: dict[str, Any],
    ) -> tuple[list[Tensor], list[Tensor | None], float]:
        lr, mu, fresh, a = group["lr"], group["momentum"], 1 - group["dampening"], group["a"]
        zs, ws = tangent_gradients(xs, gs, a, self._scratch)
        ys = [m["momentum"] for m in moments]
        zetas: list[Tensor | None] = []
        for w, y, moment in zip(ws, ys, moments, strict=True):
            if w is None:
                zetas.append(None)
                continue
            v = moment["normal_momentum"]
            v.copy_(torch.baddbmm(w, v, hold(y * -lr), beta=fresh, alpha=(3 * a - 2) / 2).add_(v, alpha=mu))
            zetas.append(hold(v * -lr))
        torch._foreach_mul_(ys, mu)
        torch._foreach_add_(ys, zs, alpha=fresh)
        xis = self._scratch.take(0, ys[0], [y.shape for y in ys])
        for y, xi in zip(ys, xis, strict=True):
            hold(torch.mul(y, -lr, out=xi))
        return xis, zetas, math.inf
