"""A short run of benchmarks/soak.py: prompts drawn at random, queued one after the other, each give what they give on
a server that keeps nothing, and what the server takes stays within bounds."""

import random
from collections.abc import Iterator

import pytest
import torch
from prompts import latent_of
from random_prompts import KEEP_NOTHING, PreparedServer, draw, usage

from runner.client import Client

COUNT, WARM, COMPARED = 40, 15, 6


@pytest.fixture
def kept(tmp_path) -> Iterator[PreparedServer]:
    with PreparedServer(tmp_path / "kept.log", "--cache-classic") as running:
        yield running


@pytest.fixture
def fresh(tmp_path) -> Iterator[PreparedServer]:
    with PreparedServer(tmp_path / "fresh.log", "--cache-none", settings=KEEP_NOTHING) as running:
        yield running


def test_prompts_in_any_order_give_what_each_gives_alone(kept, fresh):
    chance = random.Random(5)
    drawn = [draw(chance) for _ in range(COUNT)]
    found = []
    with Client(kept) as client:
        for number, one in enumerate(drawn):
            if number == WARM:
                warm = usage(kept)
            found.append(latent_of(client, client.run(one.prompt), one.node))
    end = usage(kept)
    assert end[0] < warm[0] + 100 and end[1] < warm[1] + 5
    assert "Traceback" not in kept.log_text()
    # The last ones, backwards: what came before is another thing for each.
    numbers = [number for number, one in enumerate(drawn) if one.about != "base"][: -COMPARED - 1 : -1]
    with Client(fresh) as client:
        for number in numbers:
            alone = latent_of(client, client.run(drawn[number].prompt), drawn[number].node)
            assert torch.equal(alone, found[number]), drawn[number].about
