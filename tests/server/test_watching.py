"""Watching and stopping SODA Train over the server: events to every page, the state on request, stop and keep."""

import io
import json
import re
import time

import pytest
from PIL import Image
from prompts import Playground, Prompt

from runner.client import Client, PromptFailed, Refused


def training(**settings) -> tuple[Prompt, Playground, str]:
    prompt = Prompt()
    playground = Playground(prompt)
    latents, positive = playground.drawings()
    node = playground.train(positive, latents=latents, batch_size=1, targets="cross-attention", **settings)
    return prompt, playground, node


def renamed(prompt: Prompt, old: str, new: str) -> None:
    """Give a node another id, as nodes inside subgraphs have it."""
    prompt[new] = prompt.pop(old)
    for entry in prompt.values():
        entry["inputs"] = {k: [new, v[1]] if isinstance(v, list) and v[0] == old else v
                           for k, v in entry["inputs"].items()}  # fmt: skip


def state(client, node: str) -> dict:
    """What a page that opens now is told of the node's last training."""
    return [t for t in client.get_json("/soda/training")["trainings"] if t["node"] == node][-1]


def stop(client, node: str, prompt: str) -> None:
    client.post("/soda/training/stop", {"node": node, "prompt": prompt})


def refused_stop(client, body: object) -> tuple[int, str]:
    with pytest.raises(Refused) as caught:
        client.post("/soda/training/stop", body)
    return caught.value.status, json.loads(caught.value.body)["error"]


class Watch:
    """Collects the events of one node; calls `act(event)` once, at the first event with `at` steps done."""

    def __init__(self, node: str, at: int = 0, act=lambda event: None):
        self.node, self.at, self.act = node, at, act
        self.events: list[dict] = []
        self.acted = False

    def __call__(self, kind: str, data: dict) -> None:
        if kind != "soda.training" or data["node"] != self.node:
            return
        self.events.append(data)
        if not self.acted and data["done"] >= max(1, self.at) and data["state"] == "running":
            self.acted = True
            self.act(data)

    @property
    def states(self) -> list[str]:
        return list(dict.fromkeys(event["state"] for event in self.events))


def curve(events: list[dict]) -> list[list[float]]:
    """The points that a page has after these events."""
    points: list[list[float]] = []
    for event in events:
        points = [point for point in points if point[0] <= event["since"] and point[0] % event["stride"] == 0]
        assert (points[-1][0] if points else 0) == event["since"]
        points += event["points"]
    return points


def test_every_page_is_told_the_same_small_events(client, server):
    prompt, playground, node = training(steps=30, seed=101)
    prompt.add("LossGraphNode", loss=(node, 1), filename_prefix="loss")
    watch = Watch(node)
    with Client(server) as other:
        started = time.monotonic()
        result = client.run(prompt, watch)
        took = time.monotonic() - started
        time.sleep(0.5)
        seen = [data for kind, data in list(other._events.queue) if kind == "soda.training"]
    assert seen == watch.events
    assert watch.states == ["running", "finished"]
    assert {event["prompt"] for event in seen} == {result.prompt_id}
    assert len(seen) <= took / 0.2 + 3 and all(len(json.dumps(event)) < 4000 for event in seen)
    assert len(seen) >= 4 and any(0 < event["done"] < 30 and event["left"] > 0 for event in seen)

    points = curve(seen)
    assert [step for step, *_ in points] == list(range(1, 31))
    assert points[0][1] == pytest.approx(points[0][2])  # bias-corrected: it starts at the first loss, not near 0
    now = state(client, node)
    assert now["points"] == points and (now["done"], now["steps"], now["state"]) == (30, 30, "finished")
    assert now["loss"] == points[-1][2]


def test_stop_and_keep_ends_early_and_the_graph_goes_on(client, adapters, base_unchanged):
    prompt, playground, node = training(steps=2000, seed=111)
    renamed(prompt, node, "12:3")
    playground.save(("12:3", 0), "stopped")
    taken = prompt.add("PreviewAny", source=("12:3", 2))
    watch = Watch("12:3", 5, lambda event: stop(client, "12:3", event["prompt"]))
    result = client.run(prompt, watch, timeout=120)
    assert watch.states == ["running", "stopping", "stopped"]
    steps = int(result.outputs[taken]["text"][0])
    assert 5 <= steps < 1000
    assert (adapters / "stopped_00001_.safetensors").is_file()
    now = state(client, "12:3")
    assert (now["state"], now["done"], len(now["points"])) == ("stopped", steps, steps)
    asked = next(event["done"] for event in watch.events if event["state"] == "stopping")
    assert steps - asked <= 2


def test_a_stop_for_another_run_or_node_stops_nothing(client):
    prompt, playground, node = training(steps=3, seed=121)
    playground.save((node, 0), "first")
    first = client.run(prompt).prompt_id
    assert refused_stop(client, {"node": node, "prompt": first})[0] == 409

    answers = []

    def stale(event: dict) -> None:
        answers.append(refused_stop(client, {"node": node, "prompt": first}))
        answers.append(refused_stop(client, {"node": "no such node", "prompt": event["prompt"]}))

    prompt, playground, node = training(steps=25, seed=122)
    playground.save((node, 0), "second")
    watch = Watch(node, 2, stale)
    client.run(prompt, watch)
    assert [status for status, _ in answers] == [409, 409]
    assert all("not training" in sentence for _, sentence in answers)
    assert watch.states == ["running", "finished"] and state(client, node)["done"] == 25


@pytest.mark.parametrize("body", [{}, [], "x", {"node": "1"}, 5])
def test_a_stop_without_node_and_prompt_is_refused(client, body):
    status, sentence = refused_stop(client, body)
    assert status == 400 and "JSON" in sentence


def test_a_cancelled_training_says_so(client, base_unchanged):
    prompt, playground, node = training(steps=2000, seed=131)
    playground.save((node, 0), "never")
    watch = Watch(node, 3, lambda event: client.interrupt())
    with pytest.raises(PromptFailed, match="interrupted"):
        client.run(prompt, watch, timeout=120)
    assert watch.states == ["running", "cancelled"]
    assert refused_stop(client, {"node": node, "prompt": watch.events[0]["prompt"]})[0] == 409


def test_the_last_eight_are_remembered(client):
    prompt = Prompt()
    playground = Playground(prompt)
    latents, positive = playground.drawings()
    nodes = []
    for seed in range(10):
        node = playground.train(positive, latents=latents, steps=1, batch_size=1, seed=seed, targets="cross-attention")
        prompt.add("PreviewAny", source=(node, 2))
        nodes.append(node)
    result = client.run(prompt)
    known = [t["node"] for t in client.get_json("/soda/training")["trainings"]]
    assert known == [node for node in result.executed if node in nodes][-8:]


def test_samples_are_marked_and_kept_as_a_strip(client, server, base_unchanged):
    def queue(**settings):
        prompt, playground, node = training(steps=8, seed=141, sample_prompt="a sks monster", **settings)
        prompt[node]["inputs"] |= {"clip": list(playground.clip), "vae": list(playground.vae)}
        playground.save((node, 0), "sampled")
        return client.run(prompt), node

    result, node = queue()
    assert state(client, node)["samples"] == [2, 4, 6, 8]
    (image,) = result.images(node)
    assert (image["subfolder"], image["type"]) == ("soda", "output")
    assert (
        re.fullmatch(r"training_\d{5}_\.png", image["filename"])
        and (server.output / "soda" / image["filename"]).is_file()
    )
    strip = Image.open(io.BytesIO(client.view(image)))
    assert strip.width > 4 * 192 and strip.height > 192
    assert "SodaTrain" in strip.text["prompt"]  # dropping the file on a page gives the workflow, as with any output

    again, _ = queue()
    assert node in again.cached and again.images(node) == [image]

    anew, node = queue(reuse=False)
    (other,) = anew.images(node)
    assert other["filename"] != image["filename"]  # from the same seed the same picture
    assert Image.open(io.BytesIO(client.view(other))).tobytes() == strip.tobytes()
