"""A training run: parameters, optimizers and all that a step leaves behind, to go on from or back to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..errors import SodaTrainingError
from ..stiefel import StiefelAdam
from .average import Average
from .graph import Graphs
from .guard import Guard
from .parameters import SodaParameters
from .schedule import share
from .settings import TrainingSettings

KEEP_EVERY = 10  # steps between the states that a diverged run goes back to
RETREATS = 3
Batch = TypeVar("Batch")


class Losses(NamedTuple):
    """Scalars of one batch: what is minimised, and the model's own error, by which a run is judged; where known, the
    error of an output of 0 too."""

    loss: Tensor
    error: Tensor
    nothing: Tensor | None = None


class Diverged(SodaTrainingError):
    """A run that went back as often as it may; its parameters are those of the last good step."""


class TrainingRun:
    """StiefelAdam on the rotations, AdamW on the spectra.

    loss_scale: a power of 2 that keeps small gradients above what fp16 can hold; it changes nothing else. recorded:
    forward and backward passes are recorded as CUDA graphs, under the terms of `Graphs`.

    losses: of every step taken. rate_factor: halved each time the run diverged and went back to its last good step,
    which is kept in memory and renewed while all is calm.
    """

    def __init__(
        self, parameters: SodaParameters, settings: TrainingSettings, loss_scale: float = 1.0, recorded: bool = False
    ):
        self.parameters, self.settings, self.loss_scale = parameters, settings, loss_scale
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        if parameters.rotations():
            self.optimizers["rotations"] = StiefelAdam(self._by_rate(parameters.rotations()), lr=settings.learning_rate)
        if parameters.spectra():
            self.optimizers["spectra"] = torch.optim.AdamW(
                self._by_rate(parameters.spectra()), lr=settings.learning_rate, weight_decay=0.0
            )
        self.trained = [*parameters.rotations(), *parameters.spectra()]
        self.average = Average(parameters.rotations(), parameters.spectra(), settings.ema) if settings.ema else None
        self._graphs = Graphs() if recorded else None
        self.guard = Guard()
        self.losses: list[float] = []
        self.rate_factor, self.retreats = 1.0, 0
        self._whole = True
        self._good = _copy(self._now())

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.losses)

    def advance(
        self, batch_of: Callable[[int], Batch], losses_of: Callable[[Mapping[str, Tensor], Batch], Losses]
    ) -> str:
        """Take one step; "" if it went well, else what went wrong, and then nothing has moved.

        `batch_of(i)` prepares batch i of the run, counted from 0; `losses_of(weights, batch)` computes.
        """
        settings = self.settings

        def passes(batch: Batch) -> Tensor:
            """Its losses `(2,)` or `(3,)`; the gradients are added to what is there."""
            losses = losses_of(self.parameters(), batch)
            (losses.loss * (self.loss_scale / settings.accumulation)).backward()
            return torch.stack([value.detach().float() for value in losses if value is not None])

        for name, optimizer in self.optimizers.items():
            optimizer.zero_grad(set_to_none=False)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * self._share(name) * group["rate"]
        totals = []
        for part in range(settings.accumulation):
            batch = batch_of(self.step * settings.accumulation + part)
            totals.append(passes(batch) if self._graphs is None else self._graphs(passes, batch).clone())
        if self.loss_scale != 1.0:
            torch._foreach_div_([p.grad for p in self.trained if p.grad is not None], self.loss_scale)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, settings.gradient_clip or math.inf)
        loss, error, *nothing, size = torch.cat([torch.stack(totals).mean(0), norm.reshape(1)]).tolist()
        at = f"at step {self.step + 1} of {settings.steps}"
        if not (math.isfinite(loss) and math.isfinite(size)):
            return f"the loss is {loss:g} and its gradient {size:g} {at}"
        if self.guard.sees(error, *nothing):
            return f"the loss has risen far above where it was and is {loss:g} {at}"
        self._whole = False
        for optimizer in self.optimizers.values():
            optimizer.step()
        if self.average is not None:
            self.average.update()
        self.losses.append(loss)
        self._whole = True
        if self.guard.calm and self.step % KEEP_EVERY == 0:
            self._good = _copy(self._now())
        return ""

    def moved(self) -> None:
        """To be told before what `losses_of` reads may move in memory, or where others need the memory."""
        if self._graphs is not None:
            self._graphs.forget()

    def _by_rate(self, trained: list[nn.Parameter]) -> list[dict[str, Any]]:
        """Groups for an optimizer, each with its rate over the learning rate."""
        text = {id(parameter) for parameter in self.parameters.of_text_encoder()}
        groups = [
            {"params": [p for p in trained if id(p) not in text], "rate": 1.0},
            {"params": [p for p in trained if id(p) in text], "rate": self.settings.text_encoder_rate},
        ]
        return [group for group in groups if group["params"]]

    def _share(self, name: str) -> float:
        settings = self.settings
        planned = share(self.step, settings.steps, settings.schedule, settings.warm_up)
        return planned * self.rate_factor * (settings.spectrum_rate if name == "spectra" else 1.0)

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """The parameters as they would be returned now: the average, where one is kept."""
        if self.average is None:
            yield
            return
        before = _copy(self.parameters.state_dict())
        self.average.write()
        try:
            yield
        finally:
            self.parameters.load_state_dict(before)

    def retreat(self, trouble: str) -> str:
        """Go back to the last good step at half the rate, and say so; Diverged the fourth time."""
        self._restore(self._good)
        if self.retreats == RETREATS:
            raise Diverged(
                f"{trouble}, after {RETREATS} times going back to a lower rate (now "
                f"{self.settings.learning_rate * self.rate_factor:g}); lower the learning rate "
                f"({self.settings.learning_rate:g}) or check the training images"
            )
        self.retreats += 1
        self.rate_factor /= 2
        return (
            f"{trouble[0].upper()}{trouble[1:]}: went back to step {self.step} and on at "
            f"{self.rate_factor:g} of the rate."
        )

    def state_dict(self) -> dict[str, Any]:
        """All that the run goes on from, to the last bit; tensors are shared with the run."""
        now = self._now() if self._whole else self._good
        return {
            "now": now, "good": self._good, "losses": torch.tensor(self.losses[: now["step"]], dtype=torch.float64),
            "rate_factor": self.rate_factor, "retreats": self.retreats,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises what torch raises for a state of other parameters."""
        self.losses = state["losses"].tolist()
        self.rate_factor, self.retreats = state["rate_factor"], state["retreats"]
        self._good = _copy(state["good"])
        self._restore(state["now"])

    def _now(self) -> dict[str, Any]:
        """What a step changes."""
        average = self.average
        return {
            "step": self.step,
            "parameters": self.parameters.state_dict(),
            "optimizers": {name: optimizer.state_dict()["state"] for name, optimizer in self.optimizers.items()},
            "average": None if average is None else {"sums": average.sums, "weight": average.weight},
            "guard": self.guard.state_dict(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        state = _copy(state)  # optimizers keep the tensors that they load
        self.parameters.load_state_dict(state["parameters"])
        for name, optimizer in self.optimizers.items():
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state["optimizers"][name], "param_groups": groups})
        if self.average is not None:
            for total, value in zip(self.average.sums, state["average"]["sums"], strict=True):
                total.copy_(value)
            self.average.weight = state["average"]["weight"]
        self.guard.load_state_dict(state["guard"])
        del self.losses[state["step"] :]
        self._whole = True


def _copy(tree: Any) -> Any:
    """Nested dicts and lists with every tensor in memory of its own."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree
