"""The rotations of many layers at once, from their logarithms at a strength.

    R = exp(s A_1) x ... x exp(s A_r)        terms of equal factor sizes on one side of a weight add their A_j first

The small exponentials of all layers of one form run as one batch in fp64. Terms of unlike factor sizes have no common
small form: their R is the dense exp(s sum log R_i), made anew wherever it is applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter import Layer
from .kronecker import compact, expm_factors, kronecker_sum, rotate
from .precision import CPU, has_fp64

Logs = tuple[Tensor, ...]  # strict upper triangles, fp64
Form = tuple[int, ...]  # factor sizes


@dataclass(frozen=True)
class Rotation:
    """R of one side of a weight: its factors, or `unlike` logarithms by factor sizes; neither for the identity."""

    factors: tuple[Tensor, ...] = ()
    unlike: tuple[tuple[Form, Logs], ...] = ()

    def made(self, like: Tensor) -> tuple[Tensor, ...]:
        """The factors; of unlike sizes one, the dense R in the dtype and on the device of `like`."""
        if not self.unlike:
            return self.factors
        total = torch.stack([kronecker_sum(logs, sizes) for sizes, logs in self.unlike]).sum(0)
        place = like.device if has_fp64(like.device) else CPU
        return (torch.linalg.matrix_exp(total.to(place)).to(like),)

    def turn(self, x: Tensor) -> Tensor:
        """x R^T."""
        factors = self.made(x)
        return rotate(x, factors) if factors else x


@dataclass(frozen=True)
class Rotations:
    """Those of one weight: W = output W input^T."""

    input: Rotation = Rotation()
    output: Rotation = Rotation()

    def turned(self, weight: Tensor) -> Tensor:
        """output W input^T of a W `(out, in)`."""
        return self.output.turn(self.input.turn(weight).mT).mT


def rotations(
    layers: Mapping[str, Sequence[Layer]], strength: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, Rotations]:
    """Of every layer, on `device` in `dtype`. Layers' tensors lie on the CPU."""
    found: dict[tuple[str, str], Rotation] = {}
    alike: dict[Form, dict[tuple[str, str], Logs]] = {}
    for name, terms in layers.items():
        for side in ("input", "output"):
            sums = _summed([term for term in terms if term.side == side])
            if len(sums) == 1:
                ((form, logs),) = sums.items()
                alike.setdefault(form, {})[name, side] = logs
            elif sums:
                scaled = ((form, tuple(log * strength for log in logs)) for form, logs in sorted(sums.items()))
                found[name, side] = Rotation(unlike=tuple(scaled))
    place = device if has_fp64(device) else CPU
    for form, members in alike.items():
        stacks = [torch.stack(logs).to(place) * strength for logs in zip(*members.values(), strict=True)]
        parts = [part.to(device, dtype) for part in compact(expm_factors(stacks, form), device)]
        for where, factors in zip(members, zip(*parts, strict=True), strict=True):
            found[where] = Rotation(factors)
    return {
        name: Rotations(found.get((name, "input"), Rotation()), found.get((name, "output"), Rotation()))
        for name in layers
    }


def _summed(terms: Sequence[Layer]) -> dict[Form, Logs]:
    """The logarithms of terms by factor sizes, without those that do not turn."""
    sums: dict[Form, Logs] = {}
    for term in terms:
        logs = tuple(log.to(CPU, torch.float64) for log in term.logs)
        known = sums.get(term.sizes)
        sums[term.sizes] = logs if known is None else tuple(a + b for a, b in zip(known, logs, strict=True))
    return {form: logs for form, logs in sums.items() if any(log.count_nonzero() for log in logs)}
