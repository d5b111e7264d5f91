"""How well adaptations teach the playground a concept: full fine-tune of the attention matrices, SODA, and their mixes.

    PYTHONPATH=path/to/ComfyUI python -m playground.evaluate --out DIR --jobs 8

Every run trains on the five drawings of a concept and is judged on what it has not seen:
- recognised: share of 100 samples from unseen prompts in which the reader sees the concept;
- kept: share in which it reads the prompt's other attributes right;
- gain: fall of the denoising loss at 8 fixed times on 64 unseen drawings with fixed noise.
Mixes are judged on prompts for both concepts. The table is written to DIR as JSON, one line a run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.func import functional_call

from soda.adapt import adapt
from soda.adapter import Adapter
from soda.decomposition import decompose
from soda.file import load as load_file
from soda.mixing import mix
from soda.training.loop import TrainingSettings, schedule
from soda.training.loop import train as train_soda
from soda.training.parameters import SodaParameters

from .concepts import HELD_OUT_STYLES, SUBJECTS, concept_scenes, training_set
from .drawing import draw
from .grammar import STYLES
from .model import Playground, load, sample, tokens
from .reader import load_reader, read

SAMPLES, HELD_OUT, TIMES = 100, 64, 8
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """One training: `method` is `full` or a decomposition."""

    concept: str
    method: str
    rate: float
    steps: int = 200
    batch: int = 4

    @property
    def kind(self) -> str:
        return "subject" if self.concept in SUBJECTS else "style"


class Bench:
    """The model on a device, and the measures."""

    def __init__(self, device: str, steps: int = 20):
        self.steps = steps  # of sampling; below 20 in bf16 as well, for CPUs
        self.device = torch.device(device)
        self.model: Playground = load().to(self.device)
        self.reader = load_reader().to(self.device)
        self.base = {key: w for key, w in self.model.named_parameters()
                     if key.startswith("unet.") and ".attn" in key and w.dim() == 2}  # fmt: skip

    def loss_fn(self, scenes: dict[str, Tensor], captions: list[str], batch: int, seed: int) -> Callable:
        """The loss that SODA Train minimises: velocity error at times spread evenly over [0, 1]."""
        images = (draw(scenes) * 2 - 1).to(self.device)
        with torch.no_grad():
            contexts = self.encode(captions)

        def loss(weights: Mapping[str, Tensor], step: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            rows = torch.randperm(len(images), generator=generator)[:batch]
            noise = torch.randn(images[rows].shape, generator=generator).to(self.device)
            t = (torch.randperm(len(rows), generator=generator) + torch.rand((), generator=generator)) / len(rows)
            return self.error(weights, images[rows], contexts[rows], noise, t.to(self.device)).mean()

        return loss

    def encode(self, captions: list[str]) -> Tensor:
        return self.model.encode(torch.tensor([tokens(text) for text in captions], device=self.device))

    def error(
        self, weights: Mapping[str, Tensor], images: Tensor, contexts: Tensor, noise: Tensor, t: Tensor
    ) -> Tensor:
        """Mean squared velocity error of each picture."""
        x = torch.lerp(images, noise, t.view(-1, 1, 1, 1))
        velocity = functional_call(self.model, dict(weights), (x, t, contexts))
        return (velocity - (noise - images)).square().flatten(1).mean(1)

    def train(self, run: Run, seed: int = 0) -> tuple[Weights, Adapter | None]:
        loss = self.loss_fn(*training_set(run.concept), run.batch, seed)
        if run.method != "full":
            parameters = SodaParameters(self.base, run.method)
            train_soda(parameters, loss, TrainingSettings(run.steps, run.rate, run.batch, seed), lambda *_: None)
            with torch.no_grad():
                return parameters(), Adapter(parameters.layers(), {"soda.role": run.kind}, run.concept)
        weights = {key: w.clone().requires_grad_() for key, w in self.base.items()}
        optimizer = torch.optim.AdamW(weights.values(), lr=run.rate, weight_decay=0.0)
        for step in range(run.steps):
            for group in optimizer.param_groups:
                group["lr"] = run.rate * schedule(step, run.steps)
            optimizer.zero_grad()
            loss(weights, step).backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
        return {key: w.detach() for key, w in weights.items()}, None

    @torch.no_grad()
    def samples(self, weights: Mapping[str, Tensor], captions: list[str], seed: int) -> Tensor:
        with _swapped(self.model, weights), torch.autocast(self.device.type, torch.bfloat16, enabled=self.steps < 20):
            return sample(self.model, captions, seed, self.steps)

    @torch.no_grad()
    def held_out(self, weights: Mapping[str, Tensor], subject: str = "", style: str = "") -> Tensor:
        """The loss of each of 64 unseen drawings, over 8 fixed times with fixed noise."""
        scenes, captions = concept_scenes(HELD_OUT, 4321, subject, style)
        images, contexts = (draw(scenes) * 2 - 1).to(self.device), self.encode(captions)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(9)).to(self.device)
        times = (torch.arange(TIMES) + 0.5) / TIMES
        return torch.stack([
            self.error(weights, images, contexts, noise, t.expand(HELD_OUT).to(self.device)) for t in times
        ]).mean(0).cpu()  # fmt: skip

    def judge(self, weights: Mapping[str, Tensor], subject: str = "", style: str = "") -> dict[str, float]:
        """Recognition and kept attributes on 100 unseen prompts; with no concept, on ordinary ones."""
        scenes, captions = concept_scenes(SAMPLES, 777, subject, style)
        readings = read(self.reader, self.samples(weights, captions, 5))
        right = {key: (readings[key].cpu() == scenes[key]).float().mean().item()
                 for key in ("shape", "colour", "background", "position")}  # fmt: skip
        seen = {}
        if subject:
            seen["subject"] = readings["subject"].cpu() == 1 + list(SUBJECTS).index(subject)
        if style:
            seen["style"] = readings["style"].cpu() == STYLES.index(style)
        told = ("background", "position") if subject else ("shape", "colour", "background")
        scores = {key: value.float().mean().item() for key, value in seen.items()}
        if len(seen) == 2:
            scores["both"] = (seen["subject"] & seen["style"]).float().mean().item()
        return scores | {"kept": sum(right[key] for key in told) / len(told)} | right


class _swapped:
    """The model's own parameters set to `weights` for a while."""

    def __init__(self, model: Playground, weights: Mapping[str, Tensor]):
        self.own = {key: w for key, w in model.named_parameters() if key in weights}
        self.weights = weights

    def __enter__(self) -> None:
        self.kept = {key: w.data for key, w in self.own.items()}
        for key, w in self.own.items():
            w.data = self.weights[key].detach()

    def __exit__(self, *_: object) -> None:
        for key, w in self.own.items():
            w.data = self.kept[key]


def gain(base: Tensor, adapted: Tensor) -> tuple[float, float]:
    """Mean fall of the paired losses and the half width of its 95 % interval."""
    fall = base - adapted
    return fall.mean().item(), 1.96 * fall.std().item() / len(fall) ** 0.5


def evaluate(bench: Bench, run: Run, out: Path) -> dict:
    started = time.time()
    weights, adapter = bench.train(run)
    torch.cuda.synchronize()
    seconds = time.time() - started
    concept = {run.kind: run.concept}
    mean, interval = gain(bench.held_out({}, **concept), bench.held_out(weights, **concept))
    row = asdict(run) | bench.judge(weights, **concept) | {"gain": mean, "gain_95": interval, "seconds": seconds}
    row["ordinary"] = bench.judge(weights)["kept"]
    key = f"{run.concept}-{run.method}-{run.rate:g}-{run.steps}-{run.batch}"
    torch.save((adapter, {k: w.cpu() for k, w in weights.items()}) if run.method != "full" else (None, None),
               out / f"{key}.pt")  # fmt: skip
    return row


def evaluate_mix(bench: Bench, subject: str, style: str, key: str, out: Path) -> dict:
    """Subject and style adapters of one setting, alone, mixed in the Lie algebra, and as a plain sum of changes."""
    pairs = [torch.load(out / f"{name}-{key}.pt", weights_only=False) for name in (subject, style)]
    adapters, tuned = zip(*pairs, strict=True)
    mixed = mix([(adapter, 1.0) for adapter in adapters])
    kind = key.split("-")[0]
    rebuilt = {k: adapt(w, mixed.layers[k], {kind: decompose(w, kind)} if kind != "none" else {})
               for k, w in bench.base.items()}  # fmt: skip
    plain = {k: w + sum(t[k].to(w) - w for t in tuned) for k, w in bench.base.items()}
    alone = [{k: t[k].to(bench.device) for k in bench.base} for t in tuned]
    row = {"subject": subject, "style": style, "setting": key}
    ways = {"mix": rebuilt, "plain sum": plain, "subject alone": alone[0], "style alone": alone[1]}
    for name, weights in ways.items():
        row[name] = bench.judge(weights, subject=subject, style=style)
    return row


def judge_files(bench: Bench, subject_file: Path, style_file: Path) -> dict[str, dict[str, float]]:
    """What shipped or trained adapter files show, by the rows of the demo's contact sheet.

    Prompts of the mix are those of base and mix; the adapters alone get their own concept's.
    """
    prefix = "diffusion_model."
    subject, style = (load_file(path) for path in (subject_file, style_file))

    def applied(adapter: Adapter) -> Weights:
        layers = {f"unet.{name.removeprefix(prefix)}.weight": terms for name, terms in adapter.layers.items()}
        kinds = {term.decomposition for terms in layers.values() for term in terms} - {"none"}
        return {k: adapt(w, layers[k], {kind: decompose(w, kind) for kind in kinds}) for k, w in bench.base.items()}

    concepts = {"subject": next(iter(SUBJECTS)), "style": HELD_OUT_STYLES[0]}
    alone = [applied(adapter) for adapter in (subject, style)]
    ways = {
        "base": ({}, concepts),
        "subject adapter": (alone[0], {"subject": concepts["subject"]}),
        "style adapter": (alone[1], {"style": concepts["style"]}),
        "mix of both": (applied(mix([(subject, 1.0), (style, 1.0)])), concepts),
        "plain sum": ({k: alone[0][k] + alone[1][k] - w for k, w in bench.base.items()}, concepts),
    }
    rows = {}
    for name, (weights, shown) in ways.items():
        rows[name] = bench.judge(weights, **shown)
        print(name, rows[name], flush=True)
    return rows


def work(rank: int, jobs: int, tasks: list, out: Path) -> None:
    torch.set_num_threads(2)
    count = torch.cuda.device_count()
    bench = Bench(f"cuda:{rank % count}" if count else "cpu")
    with (out / f"rows-{rank}.jsonl").open("a") as file:
        for task in tasks[rank::jobs]:
            row = evaluate(bench, task, out) if isinstance(task, Run) else evaluate_mix(bench, *task, out)
            file.write(json.dumps(row) + "\n")
            file.flush()


def base_rows(out: Path) -> None:
    """What the base shows on every concept's prompts, and on ordinary ones."""
    bench = Bench("cuda" if torch.cuda.is_available() else "cpu")
    concepts = [("subject", name) for name in SUBJECTS] + [("style", name) for name in HELD_OUT_STYLES]
    rows = [{"concept": name, "method": "base"} | bench.judge({}, **{kind: name}) for kind, name in concepts]
    rows.append({"concept": "ordinary", "method": "base"} | bench.judge({}))
    (out / "rows-base.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare adaptations on the playground.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs="+", default=[200])
    parser.add_argument("--batch", type=int, nargs="+", default=[4])
    parser.add_argument("--methods", nargs="+", default=["full", "lq", "svd", "none"])
    parser.add_argument("--full-rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-2, 2e-2, 4e-2])
    parser.add_argument("--concepts", nargs="+", default=[*SUBJECTS, *HELD_OUT_STYLES])
    parser.add_argument("--files", type=Path, nargs=2, metavar=("SUBJECT", "STYLE"), help="judge these adapters only")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.files:
        bench = Bench("cuda") if torch.cuda.is_available() else Bench("cpu", steps=10)
        rows = judge_files(bench, *options.files)
        (options.out / "demo_figures.json").write_text(json.dumps(rows, indent=1) + "\n")
        return
    settings = [(method, rate, steps, batch) for steps in options.steps for batch in options.batch
                for method in options.methods
                for rate in (options.full_rates if method == "full" else options.rates)]  # fmt: skip
    runs = [Run(concept, *setting) for setting in settings for concept in options.concepts]
    subjects = [c for c in options.concepts if c in SUBJECTS]
    styles = [c for c in options.concepts if c not in SUBJECTS]
    mixes = [(subject, style, f"{method}-{rate:g}-{steps}-{batch}") for method, rate, steps, batch in settings
             if method != "full" for subject, style in zip(subjects, styles, strict=False)]  # fmt: skip
    base_rows(options.out)
    for tasks in (runs, mixes):
        multiprocessing.spawn(work, (options.jobs, tasks, options.out), nprocs=options.jobs)


if __name__ == "__main__":
    main()
