"""Adapters onto a model: core's rank-32 LoRA beside SODA's rotation, lq and svd, on one real ComfyUI model.

ComfyUI's own classes at real size with random fp16 weights; each side in a process of its own. From nodes' work to the
last weight patched, in seconds, the median where there are several:

    first      nothing known: file read, decomposition; bases go to the disk behind it, for which it does not wait
    memory     a model loaded anew, bases in memory
    disk       the same, bases on disk only
    strength   another strength of what is applied
    mix of 8   another weight in a mix of eight adapters (eight LoRAs in a row)
    step       one forward of the model with all weights offloaded and patched as they are used (low VRAM)
    RAM        what bases take, in bytes for each number of the adapted weights; after `step` with changes kept for it

With --dynamic ComfyUI's dynamic VRAM is on, its default on NVIDIA: weights come to the device and are patched when they
are first used, so that each figure has a small forward in it; for `step` all but 4 GiB of the device are taken.

    PYTHONPATH=path/to/ComfyUI python benchmarks/apply.py [--device cuda] [--small] [--dynamic] [--turns strength]
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from apply_sides import SMALL, Case, Core, Soda, dynamic_vram
from train_step import MODELS, load_pack

SIDES = {"core LoRA r32": "lora", "SODA rotation": "none", "SODA lq": "lq", "SODA svd": "svd"}
WARM_UP = 3  # forwards or changes of strength
ROUNDS = 5
LITTLE = 4 << 30  # bytes of the device's memory for `step` with dynamic VRAM


def seconds(device: torch.device, run: Callable[[], Any]) -> float:
    """Garbage goes first: core leaves 16,000 objects in cycles whenever it patches SDXL, and Python looks for such
    among all it has, a fifth of a second, at a moment that is chance."""
    gc.collect()
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def put(case: Case, side: Any, model: Any, weights: list[float]) -> float:
    """As ComfyUI's default cache does, what a node gave is held until it gave anew."""

    def run() -> None:
        side.held = side.apply(model, weights)
        load(case, side.held)

    return seconds(case.device, run)


def load(case: Case, model: Any) -> None:
    import comfy.model_management

    comfy.model_management.load_models_gpu([model], force_full_load=True)
    if model.is_dynamic():
        forward(case, model, 16)


def fresh(case: Case, side: Any, weights: list[float]) -> tuple[float, Any]:
    """On a model that was just loaded and is on the device."""
    import comfy.model_management

    side.held = None
    comfy.model_management.unload_all_models()
    gc.collect()
    model = case.patcher()
    load(case, model)
    return put(case, side, model, weights), model


def measure(kind: str, case: Case) -> dict[str, float]:
    side: Any = (Core if kind == "lora" else Soda)(case.files(kind, 8))
    row: dict[str, float] = {}
    fresh(case, side, [1.0])  # libraries load
    side.forget("disk")
    row["first"] = fresh(case, side, [1.0])[0]  # of that model nothing is left
    if kind != "lora":
        side.cache.flush()
    row["memory"], model = fresh(case, side, [1.0])
    if kind != "lora":
        side.forget("memory")
        row["disk"], model = fresh(case, side, [1.0])
    changes = [put(case, side, model, [0.5 + 0.1 * i]) for i in range(WARM_UP + ROUNDS)]
    row["strength"] = statistics.median(changes[WARM_UP:])
    mixes = [put(case, side, model, [0.1 * i] + [0.3] * 7) for i in range(WARM_UP + ROUNDS)]
    row["mix"] = statistics.median(mixes[WARM_UP:])
    print(*(f"{t:.2f}" for t in (*changes, *mixes)), "s: strengths and mixes, from the first on", file=sys.stderr)
    numbers = sum(shape.numel() for shape in case.shapes().values())
    row["ram"] = side.bytes(side.held) / numbers
    side.held = side.apply(model, [1.0])
    row["step"] = low_vram_step(case, side.held)
    row["ram step"] = side.bytes(side.held) / numbers
    return row


def forward(case: Case, patched: Any, size: int) -> None:
    """Of batch 2."""
    context = SMALL[1]["context_dim"] if case.small else MODELS["sdxl"][1]["context_dim"]
    dtype = patched.model.get_dtype_inference()
    inputs = {
        "c_crossattn": torch.zeros(2, 77, context, device=case.device, dtype=dtype),
        "y": torch.zeros(2, 2816, device=case.device, dtype=dtype),
    }
    x = torch.zeros(2, 4, size, size, device=case.device)
    patched.model.apply_model(x, torch.ones(2, device=case.device), **inputs)


def low_vram_step(case: Case, patched: Any) -> float:
    """A forward with no weight on the device; with dynamic VRAM, with those that find room in 4 GiB."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    if patched.is_dynamic():
        comfy.model_management.soft_empty_cache()
        free, _ = torch.cuda.mem_get_info()
        taken = torch.empty(max(0, free - LITTLE), dtype=torch.uint8, device=case.device)
        comfy.model_management.load_models_gpu([patched])
    else:
        patched.patch_model(case.device, lowvram_model_memory=1)
        assert patched.model.model_lowvram and bool(patched.model.lowvram_patch_counter) == bool(patched.patches)
    size = 16 if case.small else 128
    times = [seconds(case.device, lambda: forward(case, patched, size)) for _ in range(WARM_UP + ROUNDS)]
    if patched.is_dynamic():
        print(f"{patched.loaded_size() / 2**30:.1f} GiB of weights on the device", file=sys.stderr)
        del taken
        comfy.model_management.unload_all_models()
    else:
        patched.unpatch_model(torch.device("cpu"))
    return statistics.median(times[WARM_UP:])


def in_turn(case: Case, what: str, rounds: int) -> None:
    """`strength`, `disk` or `step` of all sides in one process in turn: they hang on the host's memory, which differs
    from minute to minute, and on what the side before left there, hence the order is another in each round. For `disk`
    core reads its file too."""
    sides: dict[str, Any] = {t: (Core if k == "lora" else Soda)(case.files(k, 1)) for t, k in SIDES.items()}
    times: dict[str, list[float]] = {title: [] for title in sides}
    model = case.patcher()
    if what == "strength":
        for i in range(WARM_UP + rounds):
            if i == WARM_UP:
                sides["SODA lq"].cache.flush()  # while bases are written to the disk, all sides are slower
            for title, side in shuffled(sides, i):
                times[title].append(put(case, side, model, [0.5 + 0.1 * i]))
    elif what == "disk":
        for side in sides.values():
            fresh(case, side, [1.0])
        sides["SODA lq"].cache.flush()
        for i in range(rounds):
            for title, side in shuffled(sides, i):
                side.forget("memory")
                times[title].append(fresh(case, side, [1.0])[0])
    else:
        patched = {"unpatched": model.clone(), **{title: side.apply(model, [1.0]) for title, side in sides.items()}}
        times = {title: [] for title in patched}
        for i in range(rounds):
            for title, one in shuffled(patched, i):
                times[title].append(low_vram_step(case, one))
    print_ratios(what, {title: measured[-rounds:] for title, measured in times.items()})


def mixes_in_turn(case: Case, rounds: int) -> None:
    """SODA's mixes of eight, some after some strengths of one adapter, each as long as it takes to be warm."""
    sides = {title: Soda(case.files(kind, 8)) for title, kind in SIDES.items() if kind != "lora"}
    model = case.patcher()
    for i in range(rounds):
        for title, side in shuffled(sides, i):
            one = [put(case, side, model, [0.5 + 0.1 * j]) for j in range(WARM_UP + ROUNDS)]
            eight = [put(case, side, model, [0.1 * j] + [0.3] * 7) for j in range(WARM_UP + ROUNDS)]
            ratio = statistics.median(eight[WARM_UP:]) / statistics.median(one[WARM_UP:])
            print(f"mix       {title:15}{ratio:6.2f}x", *(f"{t:.3f}" for t in (*one, *eight)), flush=True)


def shuffled(sides: dict[str, Any], seed: int) -> list[tuple[str, Any]]:
    return random.Random(seed).sample(list(sides.items()), len(sides))


def print_ratios(what: str, times: dict[str, list[float]]) -> None:
    core = times["core LoRA r32"]
    for title, measured in times.items():
        ratio = statistics.median(own / lora for own, lora in zip(measured, core, strict=True))
        median = statistics.median(measured)
        print(f"{what:10}{title:15}{median:8.3f} s{ratio:6.2f}x", *(f"{t:.3f}" for t in measured), flush=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a UNet of some million parameters instead of SDXL's")
    parser.add_argument("--dynamic", action="store_true", help="with dynamic VRAM")
    turns = ("strength", "mix", "disk", "step")
    parser.add_argument("--turns", choices=turns, nargs="+", default=[], help="these, all sides in turn in one process")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the turns")
    parser.add_argument("--side", choices=SIDES.values(), help="measure this one in this process")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    device = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
    if arguments.side or arguments.turns:
        dynamic_vram() if arguments.dynamic else load_pack()
        from comfy.cli_args import args

        args.cpu = device.type == "cpu"
        with tempfile.TemporaryDirectory() as folder:
            args.base_directory = folder
            with torch.inference_mode():  # as ComfyUI runs nodes
                case = Case(device, arguments.small, Path(folder))
                if arguments.side:
                    print(json.dumps(measure(arguments.side, case)))
                for what in arguments.turns:
                    if what == "mix":
                        mixes_in_turn(case, arguments.rounds)
                    else:
                        in_turn(case, what, arguments.rounds)
        return
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{'a small UNet' if arguments.small else 'SDXL'}, fp16, {place}; seconds, and times core's LoRA\n")
    columns = ("first", "memory", "disk", "strength", "mix", "step")
    print(f"{'':15}" + "".join(f"{column:>15}" for column in columns) + f"{'RAM':>8}")
    core: dict[str, float] = {}
    for title, kind in SIDES.items():
        command = [sys.executable, __file__, "--device", arguments.device, "--side", kind]
        command += ["--small"] * arguments.small + ["--dynamic"] * arguments.dynamic
        child = subprocess.run(command, capture_output=True, text=True)
        if child.returncode:
            print(f"{title:15}failed: {child.stderr.strip().splitlines()[-1]}")
            print(child.stderr, file=sys.stderr)
            continue
        row = json.loads(child.stdout.strip().splitlines()[-1])
        core = core or {**row, "disk": row["first"]}
        cells = [f"{row[c]:8.3f}{row[c] / core[c]:6.2f}x" if c in row else f"{'-':>15}" for c in columns]
        print(f"{title:15}" + "".join(cells) + f"{row['ram']:8.1f}", flush=True)
        print(f"{'':15}mix of 8 / mix of 1: {row['mix'] / row['strength']:.2f}; RAM after step {row['ram step']:.1f}")


if __name__ == "__main__":
    main()
