"""How long the bases of SDXL's 560 attention matrices take, how exact they are, and how much memory they need.

    python benchmarks/decomposition.py --device cuda
    python benchmarks/decomposition.py --device cpu --fraction 0.02

The rival loops torch.linalg.svd or torch.linalg.qr over the same fp32 matrices and leaves the result where it is; this
library also stacks, converts, and copies each basis to the CPU. The weights are normal random numbers in bf16. Times
of a fraction are scaled to the whole by the numbers of each shape.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from soda.bases import WORKING_SET, decompose_all
from soda.basis_cache import BasisCache
from soda.decomposition import LOOPED, decompose, spectral_change
from soda.precision import is_fast_in_fp64, solver_device

# Transformer blocks: 10 of width 640 and 60 of width 1280. Self-attention has four square projections, attention to
# the text (2048) two square ones and two wide ones.
LAYOUT = {(640, 640): 60, (640, 2048): 20, (1280, 1280): 360, (1280, 2048): 120}
MEBI = 1 << 20


def sdxl(fraction: float, device: torch.device) -> dict[str, Tensor]:
    """A share of each shape, one matrix at least."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{shape}.{i}": (0.03 * torch.randn(shape, generator=generator)).to(device, torch.bfloat16)
        for shape, count in LAYOUT.items()
        for i in range(max(1, round(fraction * count)))
    }


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def whole_seconds(
    step: Callable[[dict[str, Tensor]], object], weights: dict[str, Tensor], device: torch.device
) -> float:
    """Seconds for all 560 matrices: each shape's time, scaled from the matrices at hand to those of SDXL."""
    total = 0.0
    for shape, count in LAYOUT.items():
        part = {name: w for name, w in weights.items() if tuple(w.shape) == shape}
        total += seconds(lambda part=part: step(part), device) * count / len(part)
    return total


def times(weights: dict[str, Tensor], device: torch.device, working_set: int) -> None:
    def ours(decomposition):
        def step(part):
            for _ in decompose_all(part, decomposition, device=device, working_set=working_set):
                pass

        return step

    def loop(solve):
        def step(part):
            for w in part.values():
                solve(w.float())

        return step

    rivals = {
        "svd": ("torch.linalg.svd", lambda w: torch.linalg.svd(w, full_matrices=False)),
        "lq": ("torch.linalg.qr", lambda w: torch.linalg.qr(w.mT)),
    }
    print(f"{'':6}{'this library':>14}{'':3}loop of{'':14}{'seconds':>8}{'ratio':>8}")
    for decomposition, (name, solve) in rivals.items():
        small = {str(w.shape): w for w in weights.values()}
        (
            ours(decomposition)(small),
            loop(solve)({"one": next(iter(weights.values()))}),
        )  # libraries load at their first use
        mine = whole_seconds(ours(decomposition), weights, device)
        other = whole_seconds(loop(solve), weights, device)
        print(f"{decomposition:6}{mine:12.2f} s{'':3}{name:20}{other:8.2f} s{other / mine:7.1f}x")


def reference(w: Tensor, delta: Tensor, decomposition: str) -> Tensor:
    """D in fp64 on the CPU by torch's own solvers."""
    w = w.cpu().double()
    if decomposition == "svd":
        u, _, vt = torch.linalg.svd(w, full_matrices=False)
        return (u * delta) @ vt
    q, t = torch.linalg.qr(w.mT)
    return (delta * t.diagonal().sign())[:, None] * q.mT


def errors(weights: dict[str, Tensor], device: torch.device) -> None:
    print("\nrelative error of D against fp64 on the CPU")
    print(f"{'':22}svd, fp64   svd, kept fp16        lq, fp32   lq, kept fp16")
    generator = torch.Generator().manual_seed(1)
    sample = {str(tuple(w.shape)): w for w in weights.values()}
    u, _, vt = torch.linalg.svd(torch.randn(640, 640, generator=generator), full_matrices=False)
    decay = torch.arange(1, 641).float() ** -0.7
    sample["(640, 640) decaying"] = ((u * decay) @ vt).to(device)
    for name, w in sample.items():
        delta, found = torch.randn(min(w.shape), generator=generator, dtype=torch.float64), []
        for decomposition, dtype, kept in (
            ("svd", torch.float64, False), ("svd", torch.float32, True), ("lq", torch.float32, False),
            ("lq", torch.float32, True),
        ):  # fmt: skip
            basis = decompose(w.to(solver_device(device, decomposition)), decomposition, dtype)
            basis = basis.kept() if kept else basis
            alive = torch.where(basis.live.cpu(), delta, 0.0)
            exact = reference(w, alive, decomposition)
            change = spectral_change(basis, alive.to(basis.live.device, dtype), w.to(basis.live.device, dtype))
            found.append(
                float(torch.linalg.matrix_norm(change.cpu().double() - exact) / torch.linalg.matrix_norm(exact))
            )
        print(f"{name:22}{found[0]:9.0e}{found[1]:17.0e}{found[2]:16.0e}{found[3]:16.0e}")


def cache(weights: dict[str, Tensor], device: torch.device) -> None:
    share = sum(w.numel() for w in weights.values()) / sum(math.prod(s) * n for s, n in LAYOUT.items())
    print(f"\nthe cache, lq, {len(weights)} matrices, {share:.0%} of the numbers")

    class Model:
        pass

    with tempfile.TemporaryDirectory() as folder:
        model = Model()
        for title, made, owner in (
            ("cold, in memory", BasisCache(), None),
            ("cold, and to a folder", BasisCache(folder=folder), model),
            ("from the folder", kept := BasisCache(folder=folder), model),
            ("a model that is known", kept, model),
        ):
            taken = seconds(lambda m=made, o=owner: list(m.bases(weights, "lq", owner=o, device=device)), device)
            print(f"{title:40}{taken:8.3f} s")


def peak(decomposition: str, fraction: float, device: torch.device, working_set: int) -> None:
    """In a process of its own: bytes above weights and cache at the height of filling a cache."""
    weights = sdxl(fraction, device)
    list(decompose_all({"small": torch.randn(64, 64)}, decomposition, device=device))

    made = BasisCache(memory=64 << 30)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest so far is forgotten
    for _ in made.bases(weights, decomposition, device=device, working_set=working_set):
        pass
    height = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM") - made.size
    print(json.dumps(height - before))


def resident(which: str) -> int:
    """Bytes of this process in memory, now or at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {which} in /proc/self/status: memory on the CPU is measured on Linux alone")


def memory(args: argparse.Namespace) -> None:
    print(f"\npeak memory above the weights and the cache, working set {args.working_set} MiB")
    for decomposition in ("svd", "lq"):
        child = subprocess.run(
            [sys.executable, __file__, "--device", args.device, "--fraction", str(args.fraction), "--working-set",
             str(args.working_set), "--peak", decomposition], capture_output=True, text=True, check=True,
        )  # fmt: skip
        taken = json.loads(child.stdout)
        print(f"{decomposition:6}{taken / MEBI:8.0f} MiB, {taken / MEBI / args.working_set:.0%} of the working set")


def solvers(device: torch.device) -> None:
    """What the choices for CUDA rest on: batched kernels of cuSOLVER against a loop."""
    print(f"\nms per matrix, batches of 8, fp64 is {'fast' if is_fast_in_fp64(device) else 'slow'} here")
    print(f"{'':8}{'cholesky: batch':>16}{'loop':>8}{'eigh: batch':>14}{'loop':>8}      (loops from {LOOPED} on)")
    for n in (128, 256, 640, 1280):
        w = torch.randn(8, n, n, device=device, dtype=torch.float64)
        gram, row = w @ w.mT, []
        for solve in (lambda g: torch.linalg.cholesky_ex(g)[0], lambda g: torch.linalg.eigh(g)[1]):
            for run in (lambda s=solve, g=gram: s(g), lambda s=solve, g=gram: [s(one) for one in g]):
                row.append(min(seconds(run, device) for _ in range(3)) / 8 * 1000)
        print(f"{n:<8}{row[0]:16.2f}{row[1]:8.2f}{row[2]:14.2f}{row[3]:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of each shape that is run")
    parser.add_argument("--working-set", type=int, default=WORKING_SET // MEBI, help="MiB")
    parser.add_argument("--peak", choices=["svd", "lq"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.peak:
        peak(args.peak, args.fraction, device, args.working_set * MEBI)
        return
    weights = sdxl(args.fraction, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"SDXL's 560 attention matrices, from {len(weights)}, on {name}, torch {torch.__version__}\n")
    times(weights, device, args.working_set * MEBI)
    errors(weights, device)
    cache(weights, device)
    memory(args)
    if device.type == "cuda":
        solvers(device)


if __name__ == "__main__":
    main()
