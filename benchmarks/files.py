"""How long files take: reading and writing an SDXL-size adapter, and mixing two of them from file to file.

    python benchmarks/files.py [--repeat 5] [--threads N]

Least of the repeated times. The raw column is safetensors alone, without names, checks, metadata, hash or fsync.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from soda.adapter import Adapter, Layer
from soda.file import load, save
from soda.kronecker import factor_sizes
from soda.metadata import describe
from soda.mixing import mix


def sdxl(seed: int) -> Adapter:
    """560 lq layers of SDXL's attention with random numbers and sketches."""
    g = torch.Generator().manual_seed(seed)
    layers = {}
    places = [(f"input_blocks.{n}.1", 640, 2) for n in (4, 5)] + [(f"input_blocks.{n}.1", 1280, 10) for n in (7, 8)]
    places += [("middle_block.1", 1280, 10)] + [(f"output_blocks.{n}.1", 1280, 10) for n in (0, 1, 2)]
    places += [(f"output_blocks.{n}.1", 640, 2) for n in (3, 4, 5)]
    for place, width, depth in places:
        for block in range(depth):
            for attention, context in (("attn1", width), ("attn2", 2048)):
                for part, inputs in (("to_q", width), ("to_k", context), ("to_v", context), ("to_out.0", width)):
                    logs = tuple(0.1 * torch.randn(n * (n - 1) // 2, generator=g) for n in factor_sizes(inputs, 3))
                    delta, sketch = torch.randn(width, generator=g), torch.randn(8, 8, generator=g)
                    name = f"diffusion_model.{place}.transformer_blocks.{block}.{attention}.{part}"
                    layers[name] = (Layer("lq", delta, logs, sketch),)
    metadata = describe(
        title="benchmark", role="style", architecture="stable-diffusion-xl-v1-base/soda", base_model="base",
        base_hash="0" * 64, training={"steps": 1000},
    )  # fmt: skip
    return Adapter(layers, metadata, f"adapter{seed}")


def least(run: Callable[[], object], repeat: int) -> float:
    """Milliseconds."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        a, b, mixed, raw = (str(Path(folder) / f"{name}.safetensors") for name in ("a", "b", "mixed", "raw"))
        save(sdxl(1), a)
        save(sdxl(2), b)
        adapter, tensors = load(a), safetensors.torch.load_file(a)

        def job() -> None:
            save(mix([(load(a), 0.8), (load(b), 0.6)]), mixed)

        rows = [
            ("read", lambda: load(a), lambda: {k: v.clone() for k, v in safetensors.torch.load_file(a).items()}),
            ("write", lambda: save(adapter, a), lambda: safetensors.torch.save_file(tensors, raw)),
            ("read, read, mix, write", job, None),
        ]
        print(f"{len(adapter.layers)} layers, {len(tensors)} tensors, {options.threads} threads, CPU")
        for dtype in (torch.float32, torch.float16):
            save(adapter, raw, dtype)
            print(f"file in {str(dtype)[6:]}: {Path(raw).stat().st_size / 1e6:.2f} MB")
        print(f"{'ms':24}{'soda':>8}{'raw':>8}")
        for name, ours, plain in rows:
            other = f"{least(plain, options.repeat):8.0f}" if plain else "       -"
            print(f"{name:24}{least(ours, options.repeat):8.0f}{other}")


if __name__ == "__main__":
    main()
