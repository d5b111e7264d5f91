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


@dataclass(frozen=True)
class Logarithms:
    """Those of many layers, on a device: whatever does not hang on the strength.

    alike: sides of layers by factor sizes, None for one that does not turn. by_size: for each n the A_j of all these
    forms, one after the other `(B, n (n - 1) / 2)` in fp64, and whose they are. unlike: as in `Rotation`.
    """

    layers: tuple[str, ...]
    device: torch.device
    alike: Mapping[Form, Sequence[tuple[str, str] | None]]
    by_size: Mapping[int, tuple[Sequence[tuple[Form, int]], Tensor]]
    unlike: Mapping[tuple[str, str], tuple[tuple[Form, Logs], ...]]

    @classmethod
    def of(cls, layers: Mapping[str, Sequence[Layer]], device: torch.device) -> Logarithms:
        """From layers whose tensors lie on the CPU."""
        alike: dict[Form, dict[tuple[str, str], Logs]] = {}
        unlike: dict[tuple[str, str], tuple[tuple[Form, Logs], ...]] = {}
        for name, terms in layers.items():
            for side in ("input", "output"):
                sums = _summed([term for term in terms if term.side == side])
                if len(sums) > 1:
                    sums = {form: logs for form, logs in sums.items() if any(log.count_nonzero() for log in logs)}
                if len(sums) == 1:
                    ((form, logs),) = sums.items()
                    alike.setdefault(form, {})[name, side] = logs
                elif sums:
                    unlike[name, side] = tuple(sorted(sums.items()))
        place = device if has_fp64(device) else CPU
        turning: dict[Form, list[tuple[str, str] | None]] = {}
        by_size: dict[int, tuple[list[tuple[Form, int]], list[Tensor]]] = {}
        for form, members in alike.items():
            stacks = [torch.stack(logs) for logs in zip(*members.values(), strict=True)]
            turns = torch.cat(stacks, 1).any(1).tolist()
            turning[form] = [where if turn else None for where, turn in zip(members, turns, strict=True)]
            for j, (n, stack) in enumerate(zip(form, stacks, strict=True)):
                whose, parts = by_size.setdefault(n, ([], []))
                whose.append((form, j))
                parts.append(stack.double())
        together = {n: (whose, torch.cat(parts).to(place)) for n, (whose, parts) in by_size.items()}
        return cls(tuple(layers), device, turning, together, unlike)

    def rotations(self, strength: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Rotations]:
        """Of every layer, on the device in `dtype`."""
        found = {
            where: Rotation(unlike=tuple((form, tuple(log * strength for log in logs)) for form, logs in sums))
            for where, sums in self.unlike.items()
        }
        factors = self._exponentials(strength)
        for form, sides in self.alike.items():
            parts = [part.to(self.device, dtype).unbind() for part in compact(factors[form], self.device)]
            for where, *of_one in zip(sides, *parts, strict=True):
                if where is not None:
                    found[where] = Rotation(tuple(of_one))
        still = Rotation()
        return {
            name: Rotations(found.get((name, "input"), still), found.get((name, "output"), still))
            for name in self.layers
        }

    def _exponentials(self, strength: float) -> dict[Form, list[Tensor]]:
        """The factors of R by form: one exponential for all matrices of a size."""
        factors: dict[Form, list[Tensor]] = {form: [torch.empty(0)] * len(form) for form in self.alike}
        for n, (whose, logs) in self.by_size.items():
            (together,) = expm_factors([logs * strength], [n])
            parts = together.split([len(self.alike[form]) for form, _ in whose])
            for (form, j), part in zip(whose, parts, strict=True):
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
