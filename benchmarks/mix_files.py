"""How long does it take to mix two SDXL-size adapters, files in and file out, and what would LoRAs take?

Writes two adapters of the SDXL layout (560 attention matrices, official factor sizes, random numbers) and two rank-32
LoRAs of the same layers to a temporary folder. The LoRAs are merged the simplest way: every tensor loaded, scaled,
added and saved. Times are the least of some runs, in seconds; a whole process includes starting Python.

    python benchmarks/mix_files.py [--operator lie_sum] [--repeat 5]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from soda import Adapter, Layer, factor_sizes, load, mix, save  # noqa: E402

MIX_PROCESS = """
import sys
from soda import load, mix, save
save(mix([(load(sys.argv[1]), 0.7), (load(sys.argv[2]), 0.9)], operator=sys.argv[4]), sys.argv[3])
"""
LORA_PROCESS = """
import sys
from safetensors.torch import load_file, save_file
one, two = load_file(sys.argv[1]), load_file(sys.argv[2])
save_file({key: 0.7 * one[key] + 0.9 * two[key] for key in one}, sys.argv[3])
"""


def sdxl_layers() -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of the 560 attention matrices of SDXL's UNet."""
    blocks = [(f"input_blocks.{i}.1", 640, 2) for i in (4, 5)] + [(f"input_blocks.{i}.1", 1280, 10) for i in (7, 8)]
    blocks += [("middle_block.1", 1280, 10)]
    blocks += [(f"output_blocks.{i}.1", 1280, 10) for i in (0, 1, 2)]
    blocks += [(f"output_blocks.{i}.1", 640, 2) for i in (3, 4, 5)]
    shapes = {}
    for block, width, depth in blocks:
        for i in range(depth):
            for attention, context in (("attn1", width), ("attn2", 2048)):
                for name, inputs in (("to_q", width), ("to_k", context), ("to_v", context), ("to_out.0", width)):
                    layer = f"diffusion_model.{block}.transformer_blocks.{i}.{attention}.{name}"
                    shapes[layer] = (width, inputs)
    return shapes


def random_adapter(shapes: dict[str, tuple[int, int]], seed: int) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for name, shape in shapes.items():
        logs = tuple(0.05 * torch.randn(n * (n - 1) // 2, generator=g) for n in factor_sizes(shape[1], 3))
        delta, sketch = 0.02 * torch.randn(min(shape), generator=g), torch.randn(8, 8, generator=g)
        layers[name] = (Layer("lq", delta, logs, sketch),)
    return Adapter(layers, {"modelspec.architecture": "stable-diffusion-xl-v1-base/soda"}, f"adapter {seed}")


def random_lora(shapes: dict[str, tuple[int, int]], seed: int, rank: int = 32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, inputs) in shapes.items():
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, rank, generator=g).half()
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, inputs, generator=g).half()
    return tensors


def least(repeat: int, work: Callable[[], object]) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operator", default="lie_sum")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    shapes = sdxl_layers()
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / f"{name}.safetensors") for name in ("one", "two", "mix")]
        loras = [str(Path(folder) / f"lora_{name}.safetensors") for name in ("one", "two", "mix")]
        for seed in (0, 1):
            save(random_adapter(shapes, seed), paths[seed])
            save_file(random_lora(shapes, seed), loras[seed])

        def process(code: str, *arguments: str) -> Callable[[], object]:
            return lambda: subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=ROOT)

        def mixed() -> Adapter:  # read anew, since an adapter remembers its hash
            return mix([(load(paths[0]), 0.7), (load(paths[1]), 0.9)], operator=options.operator)

        together = mixed()
        one = load_file(loras[0])
        two = load_file(loras[1])
        merged = {key: 0.7 * one[key] + 0.9 * two[key] for key in one}
        reading = least(options.repeat, lambda: [load(path) for path in paths[:2]])
        rows = [
            ("load two", reading, least(options.repeat, lambda: [load_file(path) for path in loras[:2]])),
            (
                "mix",
                least(options.repeat, mixed) - reading,
                least(options.repeat, lambda: {key: 0.7 * one[key] + 0.9 * two[key] for key in one}),
            ),
            (
                "save",
                least(options.repeat, lambda: save(together, paths[2])),
                least(options.repeat, lambda: save_file(merged, loras[2])),
            ),
        ]
        rows.append(("sum of these", sum(row[1] for row in rows), sum(row[2] for row in rows)))
        rows.append((
            "whole process",
            least(options.repeat, process(MIX_PROCESS, *paths, options.operator)),
            least(options.repeat, process(LORA_PROCESS, *loras)),
        ))  # fmt: skip
        empty = least(options.repeat, process("import torch"))
        rows.append(("of which Python and import torch", empty, empty))
        megabytes = [Path(path).stat().st_size / 1e6 for path in (paths[2], loras[2])]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU; least of {options.repeat} runs, seconds")
    print(f"{'':34}{'SODA ' + options.operator:>14}{'LoRA rank 32':>14}")
    for label, ours, theirs in rows:
        print(f"{label:34}{ours:14.3f}{theirs:14.3f}")
    print(f"{'size of the result, MB':34}{megabytes[0]:14.1f}{megabytes[1]:14.1f}")


if __name__ == "__main__":
    main()
