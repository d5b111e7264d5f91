"""How long one step on all factors of SDXL's attention takes: 1,680 rotations of six sizes.

Sides: `StiefelAdam` on one bank per size, on one parameter per matrix, and `StiefelSGD` on banks; the published
equations one matrix at a time; geoopt's RiemannianAdam on the same banks (`pip install geoopt`; left out without it).
The sides take turns in every round, so that a busy machine slows all alike. Gradients are fresh noise in each round.
On a GPU also: how many kernels a step launches, fills and copies included, as the profiler sees them.

    python benchmarks/stiefel_step.py [--device cuda] [--rounds 20] [--threads 2] [--lr 1e-3]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from soda.stiefel import StiefelAdam, StiefelSGD  # noqa: E402

LAYOUT = {4: 500, 8: 260, 10: 60, 16: 360, 20: 360, 64: 140}


def inverse_root(a: Tensor) -> Tensor:
    """A^(-1/2) by the coupled Newton-Schulz iteration, until its residual stops falling."""
    norm, eye = a.norm(), torch.eye(len(a), dtype=a.dtype, device=a.device)
    y, z, before, last = a / norm, eye, eye, torch.inf
    while True:
        zy = z @ y
        residual = (eye - zy).norm()
        if not residual < last:
            return before / norm.sqrt()
        t = (3 * eye - zy) / 2
        before, last = z, residual
        y, z = y @ t, t @ z


class PublishedLoop:
    """Adam on SO(n) as published, one matrix after the other."""

    def __init__(self, matrices: list[Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.matrices, self.lr, self.betas, self.eps, self.t = matrices, lr, betas, eps, 0
        self.momenta = [(torch.zeros_like(x), torch.zeros_like(x)) for x in matrices]

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        b1, b2 = self.betas
        for x, (y, p) in zip(self.matrices, self.momenta, strict=True):
            if x.grad is None:
                continue
            inner = x.T @ x.grad
            z = inner - inner.T
            y.mul_(b1).sub_(z, alpha=1 - b1)
            p.mul_(b2).add_(z**2, alpha=1 - b2)
            xi = self.lr / (1 - b1**self.t) * y / (torch.sqrt(p / (1 - b2**self.t)) + self.eps)
            x.add_(x @ xi)
            x.copy_(x @ inverse_root(x.T @ x))


def banks(device: str) -> list[Tensor]:
    return [torch.eye(n, device=device).repeat(count, 1, 1).requires_grad_() for n, count in LAYOUT.items()]


def sides(device: str, lr: float) -> dict[str, tuple[list[Tensor], Callable[[], object]]]:
    made: dict[str, tuple[list[Tensor], Callable[[], object]]] = {}
    whole = banks(device)
    made["StiefelAdam, banks"] = whole, StiefelAdam(whole, lr=lr).step
    whole = banks(device)
    made["StiefelSGD, banks"] = whole, StiefelSGD(whole, lr=lr).step
    apart = [x.detach().clone().requires_grad_() for bank in banks(device) for x in bank]
    made["StiefelAdam, 1,680 parameters"] = apart, StiefelAdam(apart, lr=lr).step
    try:
        import geoopt
    except ImportError:
        print("geoopt is not installed: its side is left out")
    else:
        stiefel = geoopt.Stiefel(canonical=True)
        whole = [geoopt.ManifoldParameter(bank.detach(), manifold=stiefel) for bank in banks(device)]
        made["geoopt RiemannianAdam, banks"] = whole, geoopt.optim.RiemannianAdam(whole, lr=lr).step
    apart = [x.detach().clone().requires_grad_() for bank in banks(device) for x in bank]
    made["published equations, a loop"] = apart, PublishedLoop(apart, lr).step
    return made


def launches(step: Callable[[], object]) -> int:
    """What one step makes a GPU do, counted."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    done = [event for event in seen.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.is_user_annotation for event in done)


def error(matrices: list[Tensor]) -> float:
    return max(
        float((x.double().mT @ x.double() - torch.eye(x.shape[-1], device=x.device)).abs().max())
        for x in (matrix.detach() for matrix in matrices)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    on_gpu = arguments.device.startswith("cuda")
    made = sides(arguments.device, arguments.lr)
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(arguments.rounds):
        for name, (matrices, step) in made.items():
            for _ in range(1 if "loop" in name else 3):  # the first finds cold caches
                for matrix in matrices:
                    matrix.grad = torch.randn_like(matrix)
                if on_gpu:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                step()
                if on_gpu:
                    torch.cuda.synchronize()
                times[name].append(1e3 * (time.perf_counter() - start))
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {arguments.threads} threads"
    print(f"{where}, torch {torch.__version__}, lr {arguments.lr:g}, {arguments.rounds} rounds\n")
    ours = min(times["StiefelAdam, banks"])
    head = f"{'one step of 1,680 matrices':32}{'min ms':>10}{'median ms':>12}{'min / ours':>12}{'|X^T X - I|':>14}"
    print(head + (f"{'launches':>12}" if on_gpu else ""))
    for name, (matrices, step) in made.items():
        least, median = min(times[name]), statistics.median(times[name])
        row = f"{name:32}{least:10.2f}{median:12.2f}{least / ours:12.1f}{error(matrices):14.1e}"
        print(row + (f"{launches(step):12}" if on_gpu else ""))


if __name__ == "__main__":
    main()
