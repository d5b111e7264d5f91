"""What a device can do with double precision, and where a decomposition therefore runs.

    svd    needs fp64: on the device if it is fast there, else on the faster of device and CPU, timed once per process
    lq, qr on the device, in fp64 where that is fast, else in fp32

Devices without fp64 (Apple's MPS, DirectML) leave all decompositions to the CPU. Fast means that a matrix product in
fp64 takes at most 8 times as long as in fp32: 1 to 2 times on data centre GPUs, 16 to 64 times on consumer ones.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor

from .adapter import Decomposition

CPU = torch.device("cpu")
FAST = 8.0
PLACES = [  # of the newer of torch's two ways to set the precision of fp32 products
    backend.matmul
    for backend in (torch.backends.cuda, torch.backends.mkldnn)
    if hasattr(backend, "matmul") and hasattr(backend.matmul, "fp32_precision")
]
TIMED_SIZE = 1024  # a 1280 x 1280 eigenproblem takes about twice as long


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """No TF32 or bf16 inside fp32 products (they would leave errors of 1e-3), no autocast; all as before afterwards."""
    with _fp32_products("highest", "ieee"), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


def tf32() -> contextlib.AbstractContextManager[None]:
    """fp32 products on a GPU that has TF32 round what they multiply to 10 bits; all as before afterwards. Where torch's
    newer way to set this was used, they stay as they are."""
    return _fp32_products("high")


@contextlib.contextmanager
def _fp32_products(overall: str, of_place: str | None = None) -> Iterator[None]:
    """torch has two ways to set this. The older says and sets all at once but refuses to answer once the newer was
    used, which sets each of PLACES."""
    saved = [place.fp32_precision for place in PLACES]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        before = None
    try:
        if before is not None:
            torch.set_float32_matmul_precision(overall)
        for place in PLACES if of_place else ():
            place.fp32_precision = of_place
        yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)
        for place, precision in zip(PLACES, saved, strict=True):
            place.fp32_precision = precision


@lru_cache
def has_fp64(device: torch.device) -> bool:
    """Whether the device computes in fp64 at all."""
    try:
        return float(torch.ones(1, device=device, dtype=torch.float64) + 1) == 2
    except (RuntimeError, TypeError):
        return False


@lru_cache
def is_fast_in_fp64(device: torch.device) -> bool:
    """Whether fp64 products take at most 8 times as long as fp32 ones; measured once, in some milliseconds."""
    if device.type == "cpu":
        return True
    if not has_fp64(device):
        return False
    seconds = {}
    with full_fp32():
        for dtype in (torch.float32, torch.float64):
            a = torch.ones(TIMED_SIZE, TIMED_SIZE, device=device, dtype=dtype)
            seconds[dtype] = _seconds(partial(_product, a), repeats=3)
    return seconds[torch.float64] <= FAST * seconds[torch.float32]


@lru_cache
def solver_device(device: torch.device, decomposition: Decomposition) -> torch.device:
    """Where the weights of `device` are decomposed fastest with the precision they need: there or on the CPU."""
    if not has_fp64(device):
        return CPU
    if decomposition != "svd" or is_fast_in_fp64(device):
        return device
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(TIMED_SIZE, TIMED_SIZE, generator=generator, dtype=torch.float64)
    gram = w @ w.mT
    return min((device, CPU), key=lambda place: _seconds(partial(_eigenvalue, gram.to(place)), repeats=1))


def _product(a: Tensor) -> float:
    return (a @ a)[0, 0].item()


def _eigenvalue(gram: Tensor) -> float:
    return torch.linalg.eigh(gram)[0][0].item()


def _seconds(run: Callable[[], float], repeats: int) -> float:
    """The least time of `repeats` runs, after one that warms up; `run` must wait for its result."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])
