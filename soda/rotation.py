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
from .kronecker import compact, expm_factors, kronecker_sum, rotate_compact
from .precision import CPU, has_fp64

Logs = tuple[Tensor, ...]  # strict upper triangles, fp64
Form = tuple[int, ...]  # factor sizes


@dataclass(frozen=True)
class Rotation:
    """R of one side of a weight: its `compact` factors, or `unlike` logarithms by factor sizes; neither for the
    identity."""

    factors: tuple[Tensor, ...] = ()
    unlike: tuple[tuple[Form, Logs], ...] = ()

    def __bool__(self) -> bool:
        """Whether it turns anything."""
        return bool(self.factors or self.unlike)

    def made(self, like: Tensor) -> tuple[Tensor, ...]:
        """The factors; of unlike sizes one, the dense R in the dtype and on the device of `like`."""
        if not self.unlike:
            return self.factors
        total = torch.stack([kronecker_sum(logs, sizes) for sizes, logs in self.unlike]).sum(0)
        place = like.device if has_fp64(like.device) else CPU
        return (torch.linalg.matrix_exp(total.to(place)).to(like),)

    def turn(self, x: Tensor) -> Tensor:
        """x R^T."""
        return rotate_compact(x, self.made(x)) if self else x


@dataclass(frozen=True)
class Rotations:
    """Those of one weight: W = output W input^T."""

    input: Rotation = Rotation()
    output: Rotation = Rotation()

    def turned(self, weight: Tensor) -> Tensor:
        """output W input^T of a W `(out, in)`."""
        turned = self.input.turn(weight)
        return self.output.turn(turned.mT).mT if self.output else turned


def rotations(
    layers: Mapping[str, Sequence[Layer]], strength: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, Rotations]:
    """Of every layer, on `device` in `dtype`. Layers' tensors lie on the CPU."""
    found: dict[tuple[str, str], Rotation] = {}
    alike: dict[Form, dict[tuple[str, str], Logs]] = {}
    for name, terms in layers.items():
        for side in ("input", "output"):
            sums = _summed([term for term in terms if term.side == side])
            if len(sums) > 1:
                sums = {form: logs for form, logs in sums.items() if any(log.count_nonzero() for log in logs)}
            if len(sums) == 1:
                ((form, logs),) = sums.items()
                alike.setdefault(form, {})[name, side] = logs
            elif sums:
                scaled = ((form, tuple(log * strength for log in logs)) for form, logs in sorted(sums.items()))
                found[name, side] = Rotation(unlike=tuple(scaled))
    place = device if has_fp64(device) else CPU
    stacks = {
        form: [torch.stack(logs).double() for logs in zip(*members.values(), strict=True)]
        for form, members in alike.items()
    }
    factors = _exponentials(stacks, strength, place)
    for form, members in alike.items():
        turning = torch.cat(stacks[form], 1).any(1).tolist()
        parts = [part.to(device, dtype).unbind() for part in compact(factors[form], device)]
        for where, turns, *of_one in zip(members, turning, *parts, strict=True):
            if turns:
                found[where] = Rotation(tuple(of_one))
    return {
        name: Rotations(found.get((name, "input"), Rotation()), found.get((name, "output"), Rotation()))
        for name in layers
    }


def _exponentials(
    stacks: Mapping[Form, Sequence[Tensor]], strength: float, place: torch.device
) -> dict[Form, list[Tensor]]:
    """The factors of R by form, from stacks of the logarithms of each: one exponential for all matrices of a size."""
    by_size: dict[int, list[tuple[Form, int]]] = {}
    for form in stacks:
        for j, n in enumerate(form):
            by_size.setdefault(n, []).append((form, j))
    factors: dict[Form, list[Tensor]] = {form: [torch.empty(0)] * len(form) for form in stacks}
    for n, where in by_size.items():
        logs = [stacks[form][j] for form, j in where]
        (together,) = expm_factors([torch.cat(logs).to(place) * strength], [n])
        for (form, j), part in zip(where, together.split([len(log) for log in logs]), strict=True):
            factors[form][j] = part
    return factors


def _summed(terms: Sequence[Layer]) -> dict[Form, Logs]:
    """The logarithms of terms by factor sizes, in fp64 where there are several terms."""
    if len(terms) == 1:
        return {terms[0].sizes: terms[0].logs}
    sums: dict[Form, Logs] = {}
    for term in terms:
        logs = tuple(log.double() for log in term.logs)
        known = sums.get(term.sizes)
        sums[term.sizes] = logs if known is None else tuple(a + b for a, b in zip(known, logs, strict=True))
    return sums
