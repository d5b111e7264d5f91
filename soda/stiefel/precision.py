"""Full fp32 products: TF32 raises the floor of |X^T X - I| from 1e-7 to 1e-3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 or bf16 inside fp32 products, no autocast; everything is as before afterwards, after an error too.

    torch has two ways to set this. The older says and sets all at once but refuses to answer once the newer was used.
    """
    backends = (torch.backends.cuda, torch.backends.mkldnn)
    places = [b.matmul for b in backends if hasattr(b, "matmul") and hasattr(b.matmul, "fp32_precision")]
    saved = [place.fp32_precision for place in places]
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:
        overall = None
    try:
        if overall is not None:
            torch.set_float32_matmul_precision("highest")
        for place in places:
            place.fp32_precision = "ieee"
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        if overall is not None:
            torch.set_float32_matmul_precision(overall)
        for place, precision in zip(places, saved, strict=True):
            place.fp32_precision = precision
