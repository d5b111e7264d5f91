"""StiefelAdam: momentum and Adam on SO(n), batched over equal sizes.

For X in SO(n), G = dL/dX and the canonical metric (Kong, Wang, Tao, "Momentum Stiefel Optimizer", ICLR 2023):

    Z   = X^T G - G^T X                                  skew: the gradient seen from X
    Y  <- b1 Y - (1 - b1) Z                              momentum in the Lie algebra: needs no transport
    p  <- b2 p + (1 - b2) Z o Z                          symmetric, so that xi stays skew
    xi  = lr / (1 - b1^t) Y / (sqrt(p / (1 - b2^t)) + eps)
    X  <- polar(X (I + xi))                              retraction: eigen-angle theta turns by atan(theta)

The polar factor comes from Newton-Schulz steps M <- 1.5 M - 0.5 M M^T M without prior normalisation: near the
manifold an error e becomes 3/4 e^2. |xi|_F is held at 0.5, inside their region of convergence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

MAX_STEP = 0.5
NEWTON_SCHULZ_STEPS = 3


def polar(m: Tensor) -> Tensor:
    """The nearest orthogonal matrix of a `(..., n, n)` whose M^T M is within 0.13 of I (see the module)."""
    for _ in range(NEWTON_SCHULZ_STEPS):
        m = torch.baddbmm(m, m, m.mT @ m, beta=1.5, alpha=-0.5)
    return m


class StiefelAdam(Optimizer):
    """Adam on banks of rotations: every parameter is fp32 `(B, n, n)`, B matrices of SO(n).

    The arithmetic is fp32 with TF32 off, whatever the model's dtype: rounding to bf16 leaves the manifold by 1e-2.
    Raises ValueError for a parameter that is not such a bank.
    """

    def __init__(
        self, params: Iterable, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ):  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        for group in self.param_groups:
            for bank in group["params"]:
                square = bank.dim() == 3 and bank.shape[1] == bank.shape[2]
                if not square or bank.dtype not in (torch.float32, torch.float64):
                    raise ValueError(
                        f"a parameter of shape {tuple(bank.shape)}, {bank.dtype} is no bank of square matrices; "
                        "StiefelAdam takes (B, n, n) in fp32"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every bank that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tf32 = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            for group in self.param_groups:
                for bank in group["params"]:
                    if bank.grad is not None:
                        self._turn(bank, group)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = tf32
        return loss

    def _turn(self, x: Tensor, group: dict) -> None:
        state = self.state[x]
        if not state:
            state["step"] = 0
            state["momentum"], state["second_moment"] = torch.zeros_like(x), torch.zeros_like(x)
        state["step"] += 1
        (b1, b2), t = group["betas"], state["step"]
        z = x.mT @ x.grad
        z = z - z.mT
        momentum, second = state["momentum"], state["second_moment"]
        momentum.lerp_(z, 1 - b1)
        second.mul_(b2).addcmul_(z, z, value=1 - b2)
        xi = momentum / (second / (1 - b2**t)).sqrt_().add_(group["eps"])
        xi.mul_(-group["lr"] / (1 - b1**t))
        length = torch.linalg.matrix_norm(xi, keepdim=True)
        xi.mul_((MAX_STEP / length).clamp_(max=1.0))
        x.copy_(polar(torch.baddbmm(x, x, xi)))
