"""Recorded steps compute what they recorded. Collected where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from soda.training.graph import EAGER, Graphs
from soda.training.parameters import SodaParameters
from soda.training.run import Losses, TrainingRun
from soda.training.settings import TrainingSettings


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
                lambda i: {"x": inputs[i]},
                lambda w, batch: Losses(*[sum((batch["x"] @ w[n].T).square().mean() for n in w)] * 2),
            )
        assert not recorded or run._graphs is not None and len(run._graphs._recorded) == 2
        return run.losses, parameters.state_dict()

    (losses, state), (expected, eager) = trained(True), trained(False)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0.0)
    for name, value in eager.items():
        torch.testing.assert_close(state[name], value, rtol=0.0, atol=1e-4)


def test_what_cannot_be_recorded_runs_as_it_is(caplog):
    graphs = Graphs()
    found = [graphs(lambda x: (x * float(x.sum())).sum(), torch.full((3,), float(i)).cuda()) for i in range(EAGER + 4)]
    assert [float(value) for value in found] == [9.0 * i * i for i in range(EAGER + 4)]
    assert "cannot be recorded" in caplog.text
