"""Peak memory of SODA Train by plan, as planned from shapes and as taken: SDXL on a GPU, a small UNet on a CPU.

Real ComfyUI classes with random weights, bf16 on a GPU and fp32 on a CPU. On a GPU the peak is torch's count of
allocated memory, the model included; on a CPU (--small) what torch's profiler sees allocated during training beyond
what was there, the model left out. "Left" is what is still allocated once the model is unloaded, of a training that
ended and of one that was cancelled.

    PYTHONPATH=path/to/ComfyUI python benchmarks/train_memory.py [--decomposition lq] [--size 1024] [--small]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from functools import partial
from itertools import product

import torch
from train_step import COMMON, MODELS, Case, load_pack

SMALL = COMMON | {
    "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 4],
    "transformer_depth_output": [1, 1, 4, 4], "transformer_depth_middle": 4, "context_dim": 256,
    "use_linear_in_transformer": False, "adm_in_channels": None, "num_heads": 4,
}  # fmt: skip
STEPS = 2
GIB = 1 << 30


def profiled(run) -> tuple[int, int]:
    """The most bytes that run() held at a time on the CPU, and those it left there."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak, held


def on_gpu(run) -> tuple[int, int]:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decomposition", choices=("lq", "svd"), default="lq")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    load_pack()
    import comfy.model_management
    from pack.hosts.comfy import dataset, train
    from pack.hosts.comfy.memory import Memory
    from pack.hosts.comfy.progress import TrainingProgress
    from pack.hosts.comfy.targets import attention_weights
    from pack.hosts.comfy.task import Task
    from pack.training.plan import PLANS
    from pack.training.settings import TrainingSettings

    MODELS["small"] = ("SD15", SMALL)
    case = Case("small" if arguments.small else "sdxl", arguments.size, arguments.batch)
    patcher, (latents, positive) = case.patcher(), case.data()
    samples, layers = dataset.collect([latents], [positive]), list(attention_weights(patcher))
    settings = TrainingSettings(steps=STEPS, learning_rate=1e-3, batch_size=arguments.batch)
    task = Task(patcher, samples, settings, arguments.decomposition)
    budget = Memory.of({patcher: layers}, samples, (), settings, arguments.decomposition)
    numbers = sum(w.numel() for key, w in patcher.model.named_parameters() if key.removesuffix(".weight") in layers)
    size = patcher.model_size() / GIB
    print(f"{len(layers)} adapted weights of {numbers / 1e6:.0f} M numbers; a model of {size:.2f} GiB")
    beside = patcher.model_size() if arguments.small else 0  # on a CPU the model is there before

    class Cancelled(TrainingProgress):
        def step(self, *args, **kwargs):
            raise comfy.model_management.InterruptProcessingException

    def run(plan, progress) -> None:
        with torch.inference_mode(), contextlib.suppress(comfy.model_management.InterruptProcessingException):
            train.train_adapter(task, progress(STEPS, None), memory=plan)
        comfy.model_management.reset_cast_buffers()  # as ComfyUI does after every prompt
        comfy.model_management.unload_all_models()
        gc.collect()
        comfy.model_management.soft_empty_cache()

    for plan, progress in ((PLANS[0], TrainingProgress), *product(PLANS, (TrainingProgress, Cancelled))):
        start = time.perf_counter()
        taken, left = (profiled if arguments.small else on_gpu)(partial(run, plan, progress))
        seconds = time.perf_counter() - start
        planned = max(budget.needed[plan] - (beside if plan != "low VRAM" else 0), 0)
        print(
            f"{plan:9} {'ended' if progress is TrainingProgress else 'cancelled':10} planned {planned / GIB:6.2f} GiB, "
            f"taken {taken / GIB:6.2f} GiB, left {left / 2**20:7.1f} MiB, {seconds:.1f} s"
        )


if __name__ == "__main__":
    main()
