"""What watching a training costs: the share of a step that the node's progress takes in a real server, pages open.

A node in a running ComfyUI takes steps of `--step` ms that only wait, and times what SODA Train tells of each: the bar,
the line on the node, the live curve. Pages are websockets that read all that they are sent. Both sides in one prompt:
with the node's id, and without one, where nobody is told.

    COMFYUI_PATH=path/to/ComfyUI python benchmarks/watching.py [--step 81] [--steps 300] [--pages 2]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runner.client import Client  # noqa: E402
from runner.server import Server  # noqa: E402

NODE = """
import json, statistics, sys, time

class Watched:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"step": ("FLOAT", {}), "steps": ("INT", {})},
                                           "hidden": {"node": "UNIQUE_ID"}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "run", True

    def run(self, step, steps, node):
        progress = next(m for name, m in sys.modules.items() if name.endswith("soda.hosts.comfy.progress"))
        found = {}
        for side, told in (("watched", node), ("unwatched", None)):
            taken = []
            with progress.TrainingProgress(steps, told) as watch:
                for i in range(steps):
                    time.sleep(step / 1e3)
                    start = time.perf_counter()
                    watch.step(i, 0.1)
                    watch.stop_requested()
                    taken.append(1e3 * (time.perf_counter() - start))
            found[side] = [statistics.mean(taken), max(taken)]
        return {"ui": {"text": [json.dumps(found)]}}

NODE_CLASS_MAPPINGS = {"Watched": Watched}
"""


class TimedServer(Server):
    """With the node that times."""

    def _stage(self) -> None:
        super()._stage()
        folder = self.base / "custom_nodes" / "timed"
        folder.mkdir()
        (folder / "__init__.py").write_text(NODE, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=float, default=81.0, help="ms")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pages", type=int, default=2)
    options = parser.parse_args()
    with TimedServer(Path(os.environ["COMFYUI_PATH"]), sys.executable, ROOT) as server:
        with contextlib.ExitStack() as pages:
            client, *_ = [pages.enter_context(Client(server)) for _ in range(options.pages)]
            inputs = {"step": options.step, "steps": options.steps}
            done = client.run({"1": {"class_type": "Watched", "inputs": inputs}})
        found = json.loads(done.outputs["1"]["text"][0])
    for side, (mean, most) in found.items():
        print(f"{side:10} {mean:7.3f} ms a step, at most {most:7.3f}: {mean / options.step:.2%} of {options.step:g} ms")


if __name__ == "__main__":
    main()
