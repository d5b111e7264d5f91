"""Many workflows drawn at random against one real ComfyUI server: is each result what it is alone, does memory stay?

Runs `--count` prompts of tests/server/random_prompts.py; now and then models are unloaded, a prompt is interrupted,
one is refused. Every `--compare`-th result is computed again by a second server that keeps no results of nodes and no
bases, in another order, and compared bit for bit. Memory and open files of the first server are printed
on the way.

    COMFYUI_PATH=path/to/ComfyUI python benchmarks/soak.py [--count 1000] [--arguments=--cache-classic]
    ... benchmarks/soak.py --plain         # ordinary LoRAs in place of all SODA: what ComfyUI itself takes
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "server")]

from prompts import Playground, Prompt, latent_of  # noqa: E402
from random_prompts import KEEP_NOTHING, Drawn, PreparedServer, draw, usage  # noqa: E402

from runner.client import Client, PromptFailed, Refused  # noqa: E402

LINES = 20  # of the curve


def start(name: str, *arguments: str, settings: str | None = None) -> PreparedServer:
    return PreparedServer(Path(tempfile.gettempdir()) / f"soak_{name}.log", *arguments, settings=settings)


class Gauge:
    """Prints what a server has taken so far."""

    def __init__(self, running: PreparedServer) -> None:
        self.running = running
        self.start = time.perf_counter()

    def show(self, done: int) -> None:
        mebibytes, files = usage(self.running)
        seconds = time.perf_counter() - self.start
        print(f"{done:6d} {seconds:8.0f} s {mebibytes:8.0f} MiB {files:5d} files", flush=True)


def latent(client: Client, drawn: Drawn) -> torch.Tensor:
    return latent_of(client, client.run(drawn.prompt), drawn.node)


def disturb(client: Client, drawn: Drawn, chance: random.Random) -> None:
    """What users do between two prompts."""
    kind = chance.random()
    if kind < 0.04:
        client.post("/free", {"unload_models": True, "free_memory": True})
    elif kind < 0.07:
        try:
            client.run(drawn.prompt, lambda event, _: client.interrupt() if event == "executing" else None)
        except PromptFailed as error:
            assert error.result.error["message"] == "interrupted", error.result.error
    elif kind < 0.10:
        refused = Prompt()
        playground = Playground(refused)
        playground.sample((playground.load("none_of_that_name.safetensors"), 0))
        try:
            client.run(refused)
        except Refused as error:
            assert "none_of_that_name" in error.body, error.body


def soak(count: int, compare: int, seed: int, plain: bool, arguments: list[str]) -> int:
    chance, events = random.Random(seed), random.Random(seed + 1)
    drawn, found = [draw(chance, plain) for _ in range(count)], {}
    print(Counter(len(d.prompt) for d in drawn), Counter(word for d in drawn for word in d.about.split()))
    with start("one", *arguments) as running, Client(running) as client:
        gauge = Gauge(running)
        for number, one in enumerate(drawn):
            if number % max(1, count // LINES) == 0:
                gauge.show(number)
            disturb(client, drawn[events.randrange(count)], events)
            found[number] = latent(client, one)
        gauge.show(count)
        complaints = [line for line in running.log_text().splitlines() if "Traceback" in line]
    print(f"{len(complaints)} tracebacks in the log {complaints[:3]}")
    numbers = list(range(0, count, compare))
    random.Random(seed + 2).shuffle(numbers)
    unlike = 0
    with start("fresh", "--cache-none", settings=KEEP_NOTHING) as running, Client(running) as client:
        for number in numbers:
            fresh = latent(client, drawn[number])
            if not torch.equal(fresh, found[number]):
                unlike += 1
                error = (fresh - found[number]).abs().max().item()
                print(f"prompt {number} differs by {error:.2e} of {fresh.abs().max():.1f}: {drawn[number].about}")
    print(f"{len(numbers) - unlike} of {len(numbers)} results computed again are the same bit for bit")
    return unlike + len(complaints)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--compare", type=int, default=10, metavar="N", help="every how manieth result")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="no SODA nodes and files")
    parser.add_argument("--arguments", nargs="*", default=[], help="more arguments of the first server")
    chosen = parser.parse_args()
    return int(soak(chosen.count, chosen.compare, chosen.seed, chosen.plain, chosen.arguments) > 0)


if __name__ == "__main__":
    sys.exit(main())
