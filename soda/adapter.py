"""What a SODA adapter is: for each adapted weight a spectrum change and the logarithms of its rotation's factors.

    W = (W0 + D(delta)) (R_1 x ... x R_r)^T,    R_j = exp(A_j),    A_j skew

(`x` the Kronecker product; `qr` rotates the outputs, from the left.) Everything stored is linear in (delta, A):
strength s is (s delta, s A), a mix is the sum. Source: arXiv 2405.21050, with the factors in the Lie algebra.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Decomposition = Literal["lq", "svd", "qr", "none"]
DECOMPOSITIONS: tuple[Decomposition, ...] = ("lq", "svd", "qr", "none")


def factor_size(numbers: int) -> int:
    """n of a strict upper triangle of n (n - 1) / 2 numbers; ValueError for any other count."""
    n = (1 + math.isqrt(1 + 8 * numbers)) // 2
    if n * (n - 1) // 2 != numbers:
        raise ValueError(f"{numbers} numbers are no strict upper triangle (0, 1, 3, 6, 10, ...)")
    return n


def split_rows(layer: str) -> tuple[str, tuple[int, int] | None]:
    """`path[a:b]` -> (path, (a, b)), rows a to b of a fused weight; `path` -> (path, None)."""
    match = re.fullmatch(r"(.+)\[([0-9]{1,9}):([0-9]{1,9})\]", layer)
    return (layer, None) if match is None else (match[1], (int(match[2]), int(match[3])))


@dataclass(frozen=True)
class Layer:
    """The adaptation of one weight `(out, in)` in one decomposition; tensors are fp32 on the CPU.

    delta: `(k,)`, k = min(out, in), None for `none`. logs: the strict upper triangles of A_1 ... A_r, row by row.
    sketch: `(8, 8)`, a linear fingerprint of D on the base it was trained on (`fingerprint.sketch`).
    """

    decomposition: Decomposition
    delta: Tensor | None
    logs: tuple[Tensor, ...]
    sketch: Tensor | None = None

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Factor sizes n_1 ... n_r."""
        return tuple(factor_size(log.numel()) for log in self.logs)

    @cached_property
    def dimension(self) -> int:
        """The rotated dimension, the product of the factor sizes."""
        return math.prod(self.sizes)

    @property
    def side(self) -> Literal["input", "output"]:
        """The side of the weight that R turns."""
        return "output" if self.decomposition == "qr" else "input"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are there: delta, logs, sketch."""
        return tuple(t for t in (self.delta, *self.logs, self.sketch) if t is not None)

    def scaled(self, s: float) -> Layer:
        """The layer at strength s: (s delta, s A)."""
        return replace(
            self,
            delta=None if self.delta is None else self.delta * s,
            logs=tuple(log * s for log in self.logs),
            sketch=None if self.sketch is None else self.sketch * s,
        )

    def is_zero(self) -> bool:
        """Whether it changes nothing."""
        return not any(t.count_nonzero() for t in (*self.logs, self.delta) if t is not None)


@dataclass(frozen=True)
class Adapter:
    """Layers by the host's module path, and what a file says about them.

    A layer name holds more than one term only in a mix of unlike forms: `(W0 + sum D) R^T` with R from all terms.
    """

    layers: Mapping[str, tuple[Layer, ...]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    name: str = ""

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over layer names and tensors: the order key of a mix, equal for equal adapters."""
        digest = hashlib.sha256()
        for name in sorted(self.layers):
            for layer in self.layers[name]:
                digest.update(f"{name}\0{layer.decomposition}\0{layer.sizes}\0".encode())
                for tensor in (layer.delta, *layer.logs):
                    if tensor is not None:
                        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def sketch_hash(self) -> str:
        """SHA-256 over layer names and sketches, which `content_hash` leaves out."""
        digest = hashlib.sha256()
        for name in sorted(self.layers):
            for index, layer in enumerate(self.layers[name]):
                if layer.sketch is not None:
                    digest.update(f"{name}\0{index}\0".encode())
                    digest.update(layer.sketch.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def form(self) -> tuple:
        """What adapters with as many numbers for the same have in common: names, decompositions, shapes."""
        return tuple(
            (name, layer.decomposition, layer.delta is None, layer.sketch is None, *(t.shape for t in layer.tensors))
            for name in sorted(self.layers)
            for layer in self.layers[name]
        )

    @cached_property
    def numbers(self) -> Tensor:
        """All of them, one after the other in the order of `form`, fp32."""
        tensors = [t.flatten() for name in sorted(self.layers) for layer in self.layers[name] for t in layer.tensors]
        return torch.cat([torch.empty(0), *tensors])

    @property
    def role(self) -> str:
        """`subject`, `style` or `other`."""
        return self.metadata.get("soda.role", "other")

    def is_single_form(self) -> tuple[bool, str]:
        """(True, "") if every layer has one term, so that one file can hold it; else (False, why)."""
        for name, terms in self.layers.items():
            if len(terms) > 1:
                forms = " and ".join(f"{term.decomposition} {term.sizes}" for term in terms)
                return False, f"layer {name!r} mixes {forms}, which have no common small form"
        return True, ""
