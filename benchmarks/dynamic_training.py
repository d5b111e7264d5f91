"""Does a training on a model with dynamic VRAM learn what it learns on one that is loaded whole? On an NVIDIA GPU.

20 steps on the playground model, eager, in every memory plan, over a patch of somebody else's and with the DCO loss;
each side in a process of its own. Printed is how far losses and adapters are apart.

    PYTHONPATH=path/to/ComfyUI python benchmarks/dynamic_training.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from apply_sides import dynamic_vram
from train_step import ROOT, load_pack

STEPS = 20
CASES: dict[str, dict[str, Any]] = {
    "fast": {}, "frugal": {"memory": "frugal"}, "low VRAM": {"memory": "low VRAM"}, "over a patch": {"patched": True},
    "DCO": {"loss": "dco", "beta": 1.0},
}  # fmt: skip


def trained(memory: str = "fast", patched: bool = False, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, all numbers of the adapter)."""
    from pack.hosts.comfy import dataset, playground
    from pack.hosts.comfy.progress import TrainingProgress
    from pack.hosts.comfy.task import Task
    from pack.hosts.comfy.train import train_adapter
    from pack.training.settings import TrainingSettings

    generator = torch.Generator().manual_seed(3)
    latents = [{"samples": torch.randn(4, 3, 64, 64, generator=generator)}]
    conditioning = [[[torch.randn(1, 77, 192, generator=generator), {}]]]
    with torch.inference_mode():  # as ComfyUI runs nodes
        model = playground.load_model(str(ROOT / "playground" / "model.safetensors"))
        if patched:
            key = next(key for key in model.model_state_dict() if "attn2.to_q.weight" in key)
            shape = model.model_state_dict()[key].shape
            model = model.clone()
            model.add_patches({key: ("diff", (torch.randn(shape, generator=generator) * 0.01,))})
        learning = TrainingSettings(steps=STEPS, learning_rate=0.005, batch_size=3, **settings)
        task = Task(model, dataset.collect(latents, conditioning), learning, "lq", 3)
        adapter, losses = train_adapter(task, TrainingProgress(STEPS, None), None, memory=memory)
    parts = [part for terms in adapter.layers.values() for term in terms for part in (*term.logs, term.delta)]
    return torch.tensor(losses), torch.cat([part.flatten() for part in parts if part is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("whole", "dynamic"), help="train in this process and write to --to")
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    if arguments.side:
        dynamic_vram() if arguments.side == "dynamic" else load_pack()
        from pack.training import graph

        graph.Graphs.__call__ = lambda self, passes, batch: passes(batch)  # eager
        torch.save({name: trained(**case) for name, case in CASES.items()}, arguments.to)
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in ("whole", "dynamic"):
            file = Path(folder) / side
            subprocess.run([sys.executable, __file__, "--side", side, "--to", str(file)], check=True)
            found[side] = torch.load(file)
    for name in CASES:
        (losses, adapter), (other_losses, other) = found["whole"][name], found["dynamic"][name]
        apart = (losses - other_losses).abs().max(), (adapter - other).abs().max(), adapter.abs().max()
        print("{:15} losses apart {:.2g}, adapters {:.2g} of {:.2g}".format(name, *map(float, apart)))


if __name__ == "__main__":
    main()
