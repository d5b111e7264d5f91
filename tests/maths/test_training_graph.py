"""Recorded steps: which batches share a recording, and that a recording computes what it recorded."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from soda.training.graph import EAGER, Graphs, _form, _mapped, _tensors
from soda.training.parameters import SodaParameters
from soda.training.run import Losses, TrainingRun
from soda.training.settings import TrainingSettings


@dataclass(frozen=True)
class Part:
    x: torch.Tensor
    said: dict
    share: float


def batch(size: int = 4, share: float = 1.0, parts: int = 1, split: int = 1, value: float = 0.0):
    made = [Part(torch.full((size, 3), value), {"text": torch.zeros(2)}, share) for _ in range(parts)]
    return made[:split], made[split:]


def test_a_form_is_all_but_the_numbers_in_the_tensors():
    assert _form(batch(value=1.0)) == _form(batch(value=2.0))


@pytest.mark.parametrize("other", [{"size": 5}, {"share": 0.5}, {"parts": 2}, {"split": 0}])
def test_batches_of_other_forms_are_told_apart(other):
    assert _form(batch()) != _form(batch(**other))


def test_a_dtype_is_part_of_the_form():
    assert _form({"x": torch.zeros(2)}) != _form({"x": torch.zeros(2, dtype=torch.int32)})


def test_a_copy_has_tensors_of_its_own_in_the_same_order():
    given = batch(parts=3, split=2, value=3.0)
    held = _mapped(given, lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf)
    assert _form(held) == _form(given)
    mine, theirs = _tensors(held), _tensors(given)
    assert len(mine) == 6
    assert all(a is not b and torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_recorded_run_learns_what_an_eager_one_learns(accumulation):
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(12, 24, generator=generator).cuda() for name in "ab"}
    inputs = [torch.randn(5 + i % 2, 24, generator=generator).cuda() for i in range(40)]

    def trained(recorded: bool) -> tuple[list[float], dict]:
        parameters = SodaParameters(weights)
        settings = TrainingSettings(steps=12, learning_rate=1e-2, accumulation=accumulation)
        run = TrainingRun(parameters, settings, recorded=recorded)
        for _ in range(settings.steps):
            if run.step == 8:
                run.moved()
            run.advance(
                lambda i: Part(inputs[i], {}, 1.0),
                lambda w, part: Losses(*[sum((part.x @ w[n].T).square().mean() for n in w)] * 2),
            )
        assert not recorded or run._graphs is not None and len(run._graphs._recorded) == 2
        return run.losses, parameters.state_dict()

    (losses, state), (expected, eager) = trained(True), trained(False)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0.0)
    for name, value in eager.items():
        torch.testing.assert_close(state[name], value, rtol=0.0, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_what_cannot_be_recorded_runs_as_it_is(caplog):
    graphs = Graphs()
    found = [graphs(lambda x: (x * float(x.sum())).sum(), torch.full((3,), float(i)).cuda()) for i in range(EAGER + 4)]
    assert [float(value) for value in found] == [9.0 * i * i for i in range(EAGER + 4)]
    assert "cannot be recorded" in caplog.text
