"""How far StiefelAdam leaves the manifold: max |X^T X - I| after 10,000 steps in fp32, and the worst on the way.

Each size and rate has a bank of two matrices, pulled to a target by gradients with noise of its own size. The other
side is what a retraction does alone: the Cayley transform without the Newton-Schulz step that follows it here.

    python benchmarks/orthogonality.py [--device cuda] [--steps 10000]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from soda.stiefel import StiefelAdam, geometry, optimizer  # noqa: E402

SIZES = [(4, 4), (8, 8), (16, 16), (20, 20), (64, 64), (64, 16)]
RATES = [1e-4, 1e-3, 1e-2, 2e-2]


def error(x: Tensor) -> float:
    x = x.detach().double()
    return float((x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).abs().max())


def unpolished(xs: list[Tensor], xis: list[Tensor], *rest: object) -> None:
    """The bare retraction, Cayley's, of square X."""
    outs = [torch.empty_like(x) for x in xs]
    geometry.RETRACTIONS["cayley"](xs, xis, outs)
    torch._foreach_copy_(xs, outs)


def run(retraction: str, steps: int, device: str, sizes: list[tuple[int, int]]) -> dict[tuple, tuple[float, float]]:
    """The last and the worst error of each size and rate."""
    random = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    cases = {(n, m, lr): torch.linalg.qr(noise(2, n, m)).Q.contiguous() for n, m in sizes for lr in RATES}
    targets = {case: torch.linalg.qr(noise(2, *case[:2])).Q for case in cases}
    groups = [{"params": [x.requires_grad_()], "lr": case[2]} for case, x in cases.items()]
    rule, worst = StiefelAdam(groups, retraction=retraction), dict.fromkeys(cases, 0.0)
    for step in range(steps):
        for case, x in cases.items():
            pull = x.detach() - targets[case]
            x.grad = pull + pull.square().mean().sqrt() * noise(*x.shape)
        rule.step()
        if step % 50 == 0:
            worst = {case: max(worst[case], error(x)) for case, x in cases.items()}
    return {case: (error(x), max(worst[case], error(x))) for case, x in cases.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=10_000)
    arguments = parser.parse_args()
    settled = run("polar", arguments.steps, arguments.device, SIZES)
    move, optimizer.move = optimizer.move, unpolished
    bare = run("cayley", arguments.steps, arguments.device, [size for size in SIZES if size[0] == size[1]])
    optimizer.move = move
    print(f"{arguments.device}, torch {torch.__version__}, fp32, {arguments.steps} steps: max |X^T X - I|\n")
    print(f"{'(n, m)':>10}{'lr':>9}{'after':>10}{'worst':>10}{'bare Cayley, after':>20}")
    for (n, m, lr), (last, worst) in settled.items():
        other = f"{bare[n, m, lr][0]:.1e}" if n == m else "-"
        print(f"{f'({n}, {m})':>10}{lr:9.0e}{last:10.1e}{worst:10.1e}{other:>20}")
    print(f"\nworst of all: {max(worst for _, worst in settled.values()):.1e}")


if __name__ == "__main__":
    main()
