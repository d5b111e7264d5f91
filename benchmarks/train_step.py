"""A training step of SODA Train beside core's Train LoRA, a plain LoRA loop and the frozen model, on one ComfyUI model.

Real ComfyUI classes at real size with random weights, bf16, on a GPU. Each side runs in a process of its own. A step is
the difference of two run lengths, set-up left out; of the frozen model and the LoRA loop it is timed directly. Peak is
torch's own count of allocated memory, the model included. SHORT is long enough for a step to have been recorded.

    PYTHONPATH=path/to/ComfyUI python benchmarks/train_step.py [--model sdxl] [--size 1024] [--batch 1]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
COMMON = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True,
          "legacy": False, "use_temporal_attention": False}  # fmt: skip
MODELS = {
    "sdxl": ("SDXL", COMMON | {
        "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10,
        "context_dim": 2048, "use_linear_in_transformer": True, "adm_in_channels": 2816, "num_classes": "sequential",
        "num_head_channels": 64}),
    "sd15": ("SD15", COMMON | {
        "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
        "context_dim": 768, "use_linear_in_transformer": False, "adm_in_channels": None, "num_heads": 8}),
}  # fmt: skip
SHORT, LONG = 6, 26
GIB = 1 << 30


def load_pack():
    """The library with its hosts under a name of its own: beside ComfyUI the repository must not be importable."""
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "benchmarks")]
    spec = importlib.util.spec_from_file_location(
        "pack", ROOT / "soda" / "__init__.py", submodule_search_locations=[str(ROOT / "soda")]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["pack"] = module
    spec.loader.exec_module(module)


class Case:
    """A model with random weights, and what to train it on."""

    def __init__(self, model: str, size: int, batch: int):
        self.model, self.size, self.batch = model, size, batch

    def patcher(self, disable_dynamic: bool = False):
        import comfy.model_management
        import comfy.model_patcher
        import comfy.supported_models

        name, unet = MODELS[self.model]
        config = getattr(comfy.supported_models, name)(dict(unet, dtype=torch.bfloat16))
        config.set_inference_dtype(torch.bfloat16, None)
        model = config.get_model({}, "", device=torch.device("cpu"))
        home = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(home).manual_seed(0)
        for key, parameter in model.named_parameters():
            fan_in = parameter.shape[1:].numel() if parameter.ndim > 1 else 1
            numbers = torch.empty(parameter.shape, dtype=parameter.dtype, device=home)
            if parameter.ndim > 1:
                numbers.normal_(0, fan_in**-0.5, generator=generator)
            else:
                numbers.fill_(float(key.endswith("weight")))
            parameter.data = numbers.cpu()
        patcher = comfy.model_patcher.ModelPatcher(
            model, load_device=comfy.model_management.get_torch_device(), offload_device=torch.device("cpu")
        )
        patcher.cached_patcher_init = (self.patcher, ())
        return patcher

    def data(self) -> tuple[dict, list]:
        generator = torch.Generator().manual_seed(1)
        latent = torch.randn(self.batch, 4, self.size // 8, self.size // 8, generator=generator)
        width = MODELS[self.model][1]["context_dim"]
        pooled = {"pooled_output": torch.randn(1, 1280, generator=generator)}
        return {"samples": latent}, [[torch.randn(1, 77, width, generator=generator), pooled]]


def by_lengths(run: Callable[[int], object]) -> dict[str, float]:
    """ms per step from two run lengths; the first run in s, and what a later one takes beside its steps."""

    def seconds(steps: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(steps)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    first = seconds(SHORT)
    torch.cuda.reset_peak_memory_stats()
    short, long = seconds(SHORT), seconds(LONG)
    step = (long - short) / (LONG - SHORT)
    return {"ms": 1e3 * step, "first": first, "setup": max(long - LONG * step, 0.0)}


def core(case: Case, bypass: bool) -> dict[str, float]:
    from comfy_extras.nodes_train import TrainLoraNode

    patcher, (latents, positive) = case.patcher(), case.data()

    def run(steps: int) -> None:
        with torch.inference_mode():
            TrainLoraNode.execute(
                [patcher], [latents], [positive], [case.batch], [steps], [1], [1e-4], [32], ["AdamW"], ["MSE"], [0],
                ["bf16"], ["bf16"], [False], ["LoRA"], [False], [1], [False], ["[None]"], [False], [bypass],
            )  # fmt: skip

    return by_lengths(run)


def soda(case: Case, decomposition: str, change: Callable[[torch.nn.Module], object] | None = None) -> dict[str, float]:
    """change: what is done to the model before."""
    from pack.hosts.comfy import dataset, train
    from pack.hosts.comfy.progress import TrainingProgress
    from pack.hosts.comfy.task import Task
    from pack.training.settings import TrainingSettings

    patcher, (latents, positive) = case.patcher(), case.data()
    if change is not None:
        change(patcher.model)
    samples = dataset.collect([latents], [positive])

    def run(steps: int) -> None:
        with torch.inference_mode():
            settings = TrainingSettings(steps=steps, learning_rate=1e-3, batch_size=case.batch)
            task = Task(patcher, samples, settings, decomposition)
            _, losses = train.train_adapter(task, TrainingProgress(steps, None))
            assert len(losses) == steps

    return by_lengths(run)


def channels_last(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def compiled_blocks(model: torch.nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.compile(dynamic=False)


def direct(case: Case, lora: bool) -> dict[str, float]:
    """The model's forward and backward, frozen or with rank-32 LoRAs as modules of their own on the same layers."""
    import comfy.model_management
    import comfy.utils
    import torch.nn.functional as F
    from pack.hosts.comfy import batches, dataset, diffusion, targets
    from pack.hosts.comfy.inject import Injection
    from pack.training.settings import TrainingSettings

    patcher, (latents, positive) = case.patcher(), case.data()
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    made = batches.Batches(patcher, dataset.collect([latents], [positive]), TrainingSettings(batch_size=case.batch))
    trained = []
    for layer in targets.attention_weights(patcher) if lora else ():
        module = comfy.utils.get_attr(patcher.model, layer)
        out, inner = module.weight.shape
        down = (torch.randn(32, inner, device="cuda") * inner**-0.5).requires_grad_()
        up = torch.zeros(out, 32, device="cuda").requires_grad_()

        def forward(x, m=module, down=down, up=up):
            return F.linear(x, m.weight, m.bias) + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))

        module.forward = forward
        trained += [down, up]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if lora else None
    shift = torch.zeros((), device="cuda", requires_grad=not lora)  # the frozen model is differentiated to its input

    def step(index: int) -> None:
        (part,) = made(index).passes
        moved = part if lora else replace(part, x=part.x + shift)
        loss = diffusion.mean_error(patcher, [moved])
        loss.backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        loss.item()

    with Injection(patcher, {}):
        for i in range(SHORT):
            step(i)
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(SHORT, LONG):
            step(i)
        torch.cuda.synchronize()
    return {"ms": 1e3 * (time.perf_counter() - start) / (LONG - SHORT), "first": 0.0, "setup": 0.0}


SIDES: dict[str, Callable[[Case], dict[str, float]]] = {
    "core Train LoRA r32, bypass": lambda case: core(case, True),
    "core Train LoRA r32, weights": lambda case: core(case, False),
    "plain LoRA r32 loop": lambda case: direct(case, True),
    "frozen forward + backward": lambda case: direct(case, False),
    "SODA Train, lq": lambda case: soda(case, "lq"),
    "SODA Train, svd": lambda case: soda(case, "svd"),
    "lq, channels-last convolutions": lambda case: soda(case, "lq", channels_last),
}
COMPILED = "lq, compiled blocks"  # not by itself: it is not ready after minutes


def measure(side: str, case: Case) -> None:
    load_pack()
    training = torch.enable_grad() if "loop" in side or "frozen" in side else contextlib.nullcontext()
    with training:
        result = soda(case, "lq", compiled_blocks) if side == COMPILED else SIDES[side](case)
    print(json.dumps({**result, "peak": torch.cuda.max_memory_allocated() / GIB}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sdxl")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--side", choices=(*SIDES, COMPILED), help="measure this one in this process")
    arguments = parser.parse_args()
    if arguments.side:
        measure(arguments.side, Case(arguments.model, arguments.size, arguments.batch))
        return
    shape = [f"--{name}={getattr(arguments, name)}" for name in ("model", "size", "batch")]
    print(f"{arguments.model}, {arguments.size} px, batch {arguments.batch}, bf16, {torch.cuda.get_device_name()}\n")
    print(f"{'':30}{'ms a step':>10}{'peak GiB':>10}{f'first {SHORT} steps, s':>20}{'set-up again, s':>20}")
    for side in SIDES:
        command = [sys.executable, __file__, *shape, "--side", side]
        child = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if child.returncode:
            print(f"{side:30}failed: {child.stderr.strip().splitlines()[-1]}")
            print(child.stderr, file=sys.stderr)
            continue
        row = json.loads(child.stdout.strip().splitlines()[-1])
        print(f"{side:30}{row['ms']:10.1f}{row['peak']:10.2f}{row['first']:20.1f}{row['setup']:20.1f}", flush=True)


if __name__ == "__main__":
    main()
