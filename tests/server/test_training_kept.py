"""Trainings that outlive what happens to them: Cancel, kill -9, a restart, the same workflow again, fifty in a row."""

import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
from prompts import Playground, Prompt

from runner.client import Client, PromptFailed
from runner.server import Server

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20


def training(prefix: str, checkpoint_every: int = 5, **settings) -> tuple[Prompt, str]:
    prompt = Prompt()
    playground = Playground(prompt)
    latents, positive = playground.drawings()
    more = {"options": playground.options(checkpoint_every=checkpoint_every), "targets": "cross-attention"}
    node = playground.train(positive, latents=latents, **{"steps": STEPS, "batch_size": 1, **more, **settings})
    playground.save((node, 0), prefix)
    return prompt, node


def tensors(adapters, prefix):
    return safetensors.torch.load_file(max(adapters.glob(f"{prefix}_0*")))


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


def went_on_from(texts: list[str]) -> int:
    """The step that a resumed training said it went on from."""
    return int(next(found for found in map(re.compile(r"Went on from step (\d+)").search, texts) if found)[1])


def forget_results(client) -> None:
    """ComfyUI's own cache would answer the same prompt."""
    client.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1)  # it frees between prompts


def at_step(node: str, step: int, act):
    """An event handler that acts once, when the node has taken so many steps."""
    done = []

    def on_event(kind: str, data: dict) -> None:
        if kind == "progress" and data["node"] == node and data["value"] >= step and not done:
            done.append(True)
            act()

    return on_event


@pytest.mark.on_cpu
def test_cancelled_and_queued_again_it_goes_on(client, adapters, base_unchanged):
    prompt, _ = training("whole", seed=101, reuse=False)
    client.run(prompt)
    shutil.rmtree(client.server.base / "user" / "soda")
    prompt, node = training("resumed", seed=101, checkpoint_every=100)  # Cancel itself saves
    with pytest.raises(PromptFailed, match="interrupted"):
        client.run(prompt, at_step(node, 12, client.interrupt))
    texts = client.run(prompt).texts[node]
    assert went_on_from(texts) >= 12
    assert same(tensors(adapters, "resumed"), tensors(adapters, "whole"))


@pytest.mark.on_cpu
def test_stopped_and_queued_again_it_goes_on(client, adapters, base_unchanged):
    prompt, _ = training("unstopped", seed=105, reuse=False)
    client.run(prompt)
    shutil.rmtree(client.server.base / "user" / "soda")
    prompt, node = training("stopped", seed=105, checkpoint_every=100)

    def stop(kind: str, data: dict) -> None:
        if kind == "soda.training" and data["node"] == node and data["done"] >= 8 and data["state"] == "running":
            client.post("/soda/training/stop", {"node": node, "prompt": data["prompt"]})

    client.run(prompt, stop)
    assert not same(tensors(adapters, "stopped"), tensors(adapters, "unstopped"))
    forget_results(client)
    assert went_on_from(client.run(prompt).texts[node]) >= 8
    assert same(tensors(adapters, "stopped"), tensors(adapters, "unstopped"))


@pytest.mark.on_cpu
def test_the_same_inputs_give_the_finished_adapter_back_unless_reuse_is_off(client, adapters):
    prompt, _ = training("first", seed=102, steps=8)
    client.run(prompt)
    forget_results(client)
    prompt, node = training("second", seed=102, steps=8, reuse=True)
    prompt.add("LossGraphNode", loss=(node, 1), filename_prefix="loss")
    result = client.run(prompt)
    assert node in result.executed and "trained before" in result.texts[node][-1]
    (plot,) = (shown["images"] for shown in result.outputs.values() if "images" in shown)
    assert len(plot) == 1 and client.view(plot[0]).startswith(b"\x89PNG")  # LOSS_MAP is what core's node plots
    assert same(tensors(adapters, "first"), tensors(adapters, "second"))
    prompt, node = training("third", seed=102, steps=8, reuse=False)
    assert "trained before" not in client.run(prompt).texts[node][-1]
    assert same(tensors(adapters, "first"), tensors(adapters, "third"))


@pytest.mark.on_cpu
def test_killed_and_resumed_on_a_fresh_server(client, adapters, tmp_path):
    """kill -9 in mid-training; the server that comes after it has the same user folder. What had
    ended before comes back at once, or is trained anew on demand."""
    prompt, _ = training("unkilled", seed=103)
    client.run(prompt)
    ended, again = training("ended", seed=104, steps=3)
    comfyui, arguments = Path(os.environ["COMFYUI_PATH"]), client.server.arguments
    first = Server(comfyui, sys.executable, ROOT, arguments=arguments, output=tmp_path)
    with first, Client(first) as doomed:
        doomed.run(ended)
        prompt, node = training("killed", seed=103)
        kill = at_step(node, 13, first.process.kill)
        thread = threading.Thread(target=_run_to_its_death, args=(doomed, prompt, kill))
        thread.start()
        thread.join(120)
        assert first.process.poll() is not None and not thread.is_alive()
        shutil.copytree(first.base / "user" / "soda", tmp_path / "soda")
    second = Server(comfyui, sys.executable, ROOT, arguments=arguments, output=tmp_path)
    with second, Client(second) as fresh:
        shutil.copytree(tmp_path / "soda", second.base / "user" / "soda")
        texts = fresh.run(prompt).texts[node]
        assert 10 <= went_on_from(texts) <= STEPS - 1
        assert "trained before" in fresh.run(ended).texts[again][-1]
        ended[again]["inputs"]["reuse"] = False
        assert "trained before" not in fresh.run(ended).texts[again][-1]
    assert same(tensors(tmp_path / "loras" / "soda", "killed"), tensors(adapters, "unkilled"))


def _run_to_its_death(client, prompt, kill) -> None:
    try:
        client.run(prompt, kill, timeout=100)
    except Exception as error:  # the server is gone
        print(f"as it should be: {error}")


VARIETY = (
    {}, {"options": {"memory": "frugal"}}, {"options": {"loss": "dco", "loss.beta": 500.0, "ema": 0.9}},
    {"decomposition": "svd", "targets": "cross-attention"},
    {"sample_prompt": "a sks monster", "options": {"sample_every": 2}, "targets": "self-attention"},
)  # fmt: skip


def test_fifty_trainings_leave_memory_and_open_files_flat(client, base_unchanged):
    """Memory after 50 is that after 10, within what one training takes and gives back."""
    server = psutil.Process(client.server.process.pid)
    seen = []
    for number in range(50):
        prompt = Prompt()
        playground = Playground(prompt)
        latents, positive = playground.drawings()
        more = {"steps": 2, "batch_size": 1, "seed": 1000 + number, "clip": playground.clip, "vae": playground.vae}
        more |= VARIETY[number % len(VARIETY)]
        more["options"] = playground.options(**more.get("options", {}))
        node = playground.train(positive, latents=latents, **more)
        prompt.add("LossGraphNode", loss=(node, 1), filename_prefix="loss")
        client.run(prompt)
        seen.append((server.memory_info().rss / 2**20, server.num_fds()))
    (memory, files), (after, files_after) = seen[9], seen[-1]
    print(f"memory after 10, 30, 50: {memory:.0f}, {seen[29][0]:.0f}, {after:.0f} MiB; files {files} and {files_after}")
    assert after < memory + 40 and files_after <= files + 2
    kept = list((client.server.base / "user" / "soda" / "training").iterdir())
    assert len(kept) <= 3 * 20
