"""What the Stiefel optimizers share: what a parameter may be, and which are stepped by the same kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from ..precision import full_fp32
from .geometry import RETRACTIONS, move
from .scratch import Scratch


class StiefelOptimizer(Optimizer):
    """Parameters are fp32 or fp64 `(..., n, m)`, n >= m: single matrices, or banks that leading dimensions count.

    All parameters of a group that have one size are stepped together: a contiguous bank where it lies, several
    parameters gathered into a bank and written back. The banks of all sizes go through each stage of the step
    together, because launches cost more than arithmetic. The state of a parameter are its moments in the tangent
    space, `(..., m, m)` and for n > m also `(..., n, m)`, and counters such as its number of steps, so that a run goes
    on bit by bit (on a CPU) from a `state_dict` and the parameters.

    fp16 and bf16 are refused, because rounding to them leaves the manifold by 1e-2: keep the parameter in fp32 and
    cast it where it is used. Products are full fp32 inside the step, whatever TF32 or autocast say outside.
    """

    MOMENTS: tuple[str, ...]
    COUNTERS: dict[str, float] = {"step": 0}

    def __init__(self, params: ParamsT, defaults: dict[str, Any]):
        super().__init__(params, defaults)
        self._scratch = Scratch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scratch = Scratch()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A group with settings of its own. Raises ValueError for settings or parameters that cannot be stepped."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_settings(group)
            for parameter in group["params"]:
                _check_parameter(parameter)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_settings(self, group: dict[str, Any]) -> None:
        if not group["lr"] >= 0:
            raise ValueError(f"lr is {group['lr']}; give a rate of at least 0")
        if not group["a"] < 1:
            raise ValueError(f"a is {group['a']}; give less than 1, such as 0.5 (canonical metric) or 0 (Euclidean)")
        if group["retraction"] not in RETRACTIONS:
            raise ValueError(f"retraction is {group['retraction']!r}; give one of {', '.join(RETRACTIONS)}")

    def _count(self, counters: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
        """The counters one step on."""
        return {"step": counters["step"] + 1}

    def _tangents(
        self,
        xs: list[Tensor],
        gs: list[Tensor],
        moments: list[dict[str, Tensor]],
        counters: dict[str, Any],
        group: dict[str, Any],
    ) -> tuple[list[Tensor], list[Tensor | None], float]:
        """The held steps (xi, zeta) from each X `(B, n, m)` with gradient G, and what no entry of xi can exceed.

        Updates the moments.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what the closure returns.

        Raises ValueError for a sparse gradient, and at a parameter's first step if it is not near the manifold.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with full_fp32():
            for group in self.param_groups:
                for sizes in self._together(group["params"]):
                    self._step_together(sizes, group)
        return loss

    def _together(self, parameters: list[Tensor]) -> list[list[list[Tensor]]]:
        """Those with a gradient: what goes through the same stages -> its sizes -> the parameters of a size.

        What goes together has one dtype, device and number of steps.
        """
        found: dict[tuple, dict[torch.Size, list[Tensor]]] = {}
        for p in parameters:
            if p.grad is None or not p.numel():
                continue
            if p not in self.state:
                self._begin(p)
            state, size = self.state[p], p.shape[-2:]
            key = p.dtype, p.device, *(state[name] for name in self.COUNTERS)
            found.setdefault(key, {}).setdefault(size, []).append(p)
        return [list(sizes.values()) for sizes in found.values()]

    def _begin(self, p: Tensor) -> None:
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError(f"the gradient of a parameter of shape {tuple(p.shape)} is sparse; give a dense one")
        n, m = p.shape[-2:]
        x = p.reshape(-1, n, m)
        off = torch.bmm(x.mT, x)
        off.diagonal(dim1=-2, dim2=-1).sub_(1)
        error = float(torch.linalg.vector_norm(off, dim=(-2, -1)).max())
        if not error <= 0.5:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)}, {p.dtype} has no orthonormal columns: |X^T X - I| is "
                f"{error:.2g}; start from torch.nn.init.orthogonal_ or torch.linalg.qr(x).Q"
            )
        state = self.state[p]
        state.update(self.COUNTERS)
        for name in self.MOMENTS:
            state[name] = p.new_zeros(*p.shape[:-2], m, m)
            if n > m:
                state["normal_" + name] = torch.zeros_like(p, memory_format=torch.contiguous_format)

    def _step_together(self, sizes: list[list[Tensor]], group: dict[str, Any]) -> None:
        states = [[self.state[p] for p in parameters] for parameters in sizes]
        counters = self._count(states[0][0], group)
        xs, gs, moments = [], [], []
        for parameters, of_size in zip(sizes, states, strict=True):
            for state in of_size:
                state.update(counters)
            names = [name for name in of_size[0] if name not in self.COUNTERS]
            moments.append({name: _gather([state[name] for state in of_size]) for name in names})
            xs.append(_gather(parameters))
            gs.append(_gather([p.grad for p in parameters if p.grad is not None]))
        xis, zetas, entry = self._tangents(xs, gs, moments, counters, group)
        vs = [of_size.get("normal_momentum") for of_size in moments]
        move(xs, xis, zetas, vs, group["retraction"], self._scratch, entry)
        for x, parameters, banks, of_size in zip(xs, sizes, moments, states, strict=True):
            _scatter(x, parameters)
            for name, bank in banks.items():
                _scatter(bank, [state[name] for state in of_size])


def _check_parameter(p: Tensor) -> None:
    what = f"a parameter of shape {tuple(p.shape)}, {p.dtype}"
    if p.dim() < 2:
        raise ValueError(f"{what} is no matrix; give (..., n, m), and vectors to another optimizer")
    if p.shape[-2] < p.shape[-1]:
        raise ValueError(f"{what} has more columns than rows; make its transpose the parameter")
    if p.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{what} would leave the manifold by rounding; keep it in fp32 and cast it where it is used")


def _gather(tensors: list[Tensor]) -> Tensor:
    """One bank `(B, n, m)`: a view if there is one contiguous tensor, else a copy."""
    n, m = tensors[0].shape[-2:]
    if len(tensors) == 1:
        return tensors[0].reshape(-1, n, m)
    return torch.cat([t if t.dim() == 2 else t.reshape(-1, m) for t in tensors]).view(-1, n, m)


def _scatter(bank: Tensor, tensors: list[Tensor]) -> None:
    """Write a bank back to the tensors that it was gathered from, unless it lies in them."""
    if bank.data_ptr() == tensors[0].data_ptr():
        return
    rows = bank.flatten(0, 1).split([t.shape[:-1].numel() for t in tensors])
    torch._foreach_copy_(tensors, [r if t.dim() == 2 else r.view(t.shape) for r, t in zip(rows, tensors, strict=True)])
