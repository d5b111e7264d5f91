"""How well adaptations teach the playground a concept: full fine-tune of the attention matrices, SODA, and their mixes.

    PYTHONPATH=path/to/ComfyUI python -m playground.evaluate --out DIR --jobs 16
    PYTHONPATH=path/to/ComfyUI python -m playground.evaluate --out DIR --files SUBJECT STYLE

The first trains every concept with every method and rate, then mixes every subject adapter with every style adapter of
one method and judges the mixes on prompts for both. The measures are those of `bench`; `rows.jsonl` in DIR gets
one line a run. The second judges two adapter files and writes `demo_figures.json`.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing

from soda.adapter import Adapter
from soda.file import load as load_file
from soda.file import save as save_file
from soda.mixing import mix

from .bench import Bench, Run, Weights, gain
from .concepts import HELD_OUT_STYLES, SUBJECTS

PREFIX = "diffusion_model."
TEMPLATE_WEIGHTS = (1.2, 1.0)  # of subject and style in the template that mixes the two


def evaluate(bench: Bench, run: Run, out: Path) -> dict:
    """Train and judge one run; a SODA adapter is kept in `out`."""
    started = time.time()
    weights, adapter = bench.train(run)
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.time() - started
    concept = {run.kind: run.concept}
    mean, interval = gain(bench.held_out({}, **concept), bench.held_out(weights, **concept))
    row = asdict(run) | bench.judge(weights, **concept) | {"gain": mean, "gain_95": interval, "seconds": seconds}
    if adapter:
        save_file(adapter, out / f"{run.key}.safetensors")
    return row | {"ordinary": bench.judge(weights)["kept"]}


def evaluate_base(bench: Bench, concept: str) -> dict:
    """What the base shows on a concept's prompts, or on ordinary ones."""
    kind = "subject" if concept in SUBJECTS else "style"
    shown = {kind: concept} if concept else {}
    return {"concept": concept or "ordinary", "method": "base"} | bench.judge({}, **shown)


def mixtures(bench: Bench, subject: Adapter, style: Adapter, weights: tuple[float, float]) -> dict[str, Weights]:
    """Both mixed in the Lie algebra, and the plain sum of their weight changes."""
    mixed = bench.applied(mix(list(zip((subject, style), weights, strict=True))))
    alone = [bench.applied(adapter) for adapter in (subject, style)]
    changes = {k: sum(a * (own[k] - w) for a, own in zip(weights, alone, strict=True)) for k, w in bench.base.items()}
    return {"mix": mixed, "plain sum": {k: w + changes[k] for k, w in bench.base.items()}}


def evaluate_pair(bench: Bench, subject: Run, style: Run, out: Path) -> dict:
    """Two trained adapters mixed at weights 1 and 1, and each alone, on prompts for both."""
    adapters = [load_file(out / f"{run.key}.safetensors") for run in (subject, style)]
    names = {"subject": subject.concept, "style": style.concept}
    alone = {f"{kind} alone": bench.applied(adapter) for kind, adapter in zip(names, adapters, strict=True)}
    ways = mixtures(bench, *adapters, weights=(1.0, 1.0)) | alone
    judged = {name: bench.judge(weights, **names) for name, weights in ways.items()}
    return names | {"runs": [subject.key, style.key]} | judged


def judge_files(bench: Bench, subject_file: Path, style_file: Path) -> dict[str, dict[str, float]]:
    """What two adapter files show, by the rows of the demo's contact sheet; each alone on its own concept's prompts."""
    subject, style = (renamed(load_file(path)) for path in (subject_file, style_file))
    names = {"subject": next(iter(SUBJECTS)), "style": HELD_OUT_STYLES[0]}
    rows = {"base": bench.judge({}, **names)}
    for kind, adapter in (("subject", subject), ("style", style)):
        weights, own = bench.applied(adapter), {kind: names[kind]}
        mean, interval = gain(bench.held_out({}, **own), bench.held_out(weights, **own))
        rows[f"{kind} adapter"] = bench.judge(weights, **own) | {"gain": mean, "gain_95": interval}
    both = mixtures(bench, subject, style, TEMPLATE_WEIGHTS)
    return rows | {f"{name} of both": bench.judge(weights, **names) for name, weights in both.items()}


def renamed(adapter: Adapter) -> Adapter:
    """From ComfyUI's layer names to the bench's."""
    layers = {f"unet.{name.removeprefix(PREFIX)}.weight": terms for name, terms in adapter.layers.items()}
    return Adapter(layers, adapter.metadata, adapter.name)


def work(tasks: multiprocessing.Queue, rows: multiprocessing.Queue) -> None:
    """Take `(function, arguments)` until None comes; give rows, or what went wrong."""
    torch.set_num_threads(1)
    try:
        bench = Bench("cuda" if torch.cuda.is_available() else "cpu")
        while task := tasks.get():
            function, arguments = task
            rows.put(function(bench, *arguments))
    except Exception:
        rows.put(traceback.format_exc())


def run_all(tasks: list[tuple[Callable[..., dict], tuple]], jobs: int, out: Path) -> None:
    """Run the tasks in `jobs` processes; their rows go to `rows.jsonl` as they come."""
    context = multiprocessing.get_context("spawn")
    queue, rows = context.Queue(), context.Queue()
    workers = [context.Process(target=work, args=(queue, rows), daemon=True) for _ in range(jobs)]
    for task in [*tasks, *[None] * jobs]:
        queue.put(task)
    for worker in workers:
        worker.start()
    with (out / "rows.jsonl").open("a") as file:
        for _ in tasks:
            row = rows.get()
            if isinstance(row, str):
                raise RuntimeError(row)
            file.write(json.dumps(rounded(row)) + "\n")
            file.flush()


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 5) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare adaptations on the playground.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=8, help="processes; each takes 6 GB of a GPU")
    parser.add_argument("--methods", nargs="+", default=["full", "lq"])
    parser.add_argument("--full-rates", type=float, nargs="+", default=[3e-4, 6e-4])
    parser.add_argument("--subject-rates", type=float, nargs="+", default=[1e-2, 2e-2])
    parser.add_argument("--style-rates", type=float, nargs="+", default=[3e-2, 4e-2])
    parser.add_argument("--concepts", nargs="+", default=[*SUBJECTS, *HELD_OUT_STYLES])
    parser.add_argument("--files", type=Path, nargs=2, metavar=("SUBJECT", "STYLE"), help="judge these adapters only")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.files:
        bench = Bench("cuda") if torch.cuda.is_available() else Bench("cpu", steps=10)
        rows = rounded(judge_files(bench, *options.files))
        (out / "demo_figures.json").write_text(json.dumps(rows, indent=1) + "\n")
        return
    runs = [Run(concept, method, rate) for method in options.methods for concept in options.concepts
            for rate in (options.full_rates if method == "full" else
                         options.subject_rates if concept in SUBJECTS else options.style_rates)]  # fmt: skip
    pairs = [(subject, style, out) for subject in runs if subject.kind == "subject" and subject.method != "full"
             for style in runs if style.kind == "style" and style.method == subject.method]  # fmt: skip
    base = [(evaluate_base, (concept,)) for concept in ["", *options.concepts]]
    run_all(base + [(evaluate, (run, out)) for run in runs], options.jobs, out)
    run_all([(evaluate_pair, pair) for pair in pairs], options.jobs, out)


if __name__ == "__main__":
    main()
