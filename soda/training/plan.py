"""How much memory a training takes, by three plans that learn the same.

    fast       all adapted weights of one shape are built at once, and every activation is kept
    frugal     each weight is built where it is used; of each block only its input is kept, the rest computed again
    low VRAM   frugal, with the base weights and their vectors in main memory, sent over one by one

Bytes on the training device, from M the model's, A those of the adapted weights as the model computes with them, V
those of their vectors (lq: Q; svd: U and V^T), S what one forward pass takes when sampling, L the largest weight:

    fast       M + V + 5 A + 20 S     their stack, W0 + D, half turned, turned, and gradients
    frugal     M + V + 32 L + 5 S     the weights of one block, a few times each
    low VRAM           32 L + 5 S

20 S fits SDXL at 1024 px on an H200 (9.9 GiB of the frozen model, of which 4.8 are weights); 5 S is a guess on the safe
side. `benchmarks/train_memory.py` prints them beside what was taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch

from ..adapter import Decomposition

Plan = Literal["fast", "frugal", "low VRAM"]
PLANS: tuple[Plan, ...] = get_args(Plan)


def needs(
    shapes: Iterable[tuple[int, ...]], decomposition: Decomposition, dtype: torch.dtype, model: float, sampling: float
) -> dict[Plan, float]:
    """Bytes that each plan takes, for adapted weights of `shapes` (out, in) and the bytes of the model and sampling."""
    numbers = vectors = largest = 0
    for shape in shapes:
        out, inner = shape
        numbers += out * inner
        vectors += min(shape) * {"lq": inner, "qr": out, "svd": out + inner, "none": 0}[decomposition]
        largest = max(largest, out * inner)
    a, v, block = (dtype.itemsize * count for count in (numbers, vectors, 32 * largest))
    return {
        "fast": model + v + 5 * a + 20 * sampling,
        "frugal": model + v + block + 5 * sampling,
        "low VRAM": block + 5 * sampling,
    }


def choose(needed: Mapping[Plan, float], free: float) -> Plan:
    """The fastest plan that fits; the last one if none does."""
    return next((plan for plan in PLANS if needed[plan] <= free), PLANS[-1])


def after(plan: Plan) -> Plan | None:
    """The next more frugal plan."""
    return PLANS[PLANS.index(plan) + 1] if plan != PLANS[-1] else None
