"""Does an adapter trained on a base A still work on a fine-tune B of it? SODA files and LoRAs on both.

    PYTHONPATH=path/to/ComfyUI python -m playground.transfer --out DIR [--device cuda --samples 100]

B is the playground after a short full fine-tune on drawings in another style that their captions do not tell, as
checkpoints that people share have a look of their own. The subject and the style that ship, `svd` adapters and LoRAs,
trained on A on the same weights with the same drawings, steps and noise, are then judged on A and on B by the
measures of `bench`; on a CPU with fewer samples and steps. `transfer.jsonl` in DIR gets a row for each concept,
method and base.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from soda.adapt import adapt
from soda.adapter import Adapter
from soda.decomposition import decompose, spectral_change
from soda.file import load as load_file
from soda.fit import rotation_only
from soda.training.schedule import share
from soda.transport import transport

from .bench import TARGETS, Bench, Run, Weights, gain
from .concepts import HELD_OUT_STYLES, SUBJECTS, training_set
from .drawing import draw
from .evaluate import renamed, rounded
from .grammar import STYLES, caption, sample_scenes

FILES = Path(__file__).parent / "adapters"
RUNS = {  # the settings of what ships
    "subject": Run(next(iter(SUBJECTS)), "lq", 0.015, 200),
    "style": Run(HELD_OUT_STYLES[0], "lq", 0.04, 300),
}
LOOK = "gilded"  # of everything that B draws


def fine_tune(bench: Bench, steps: int, batch: int, rate: float) -> dict[str, Tensor]:
    """All weights of the UNet after a fine-tune on ordinary scenes in the style LOOK."""
    weights = {k: w.clone().requires_grad_() for k, w in bench.model.named_parameters() if k.startswith("unet.")}
    optimizer = torch.optim.AdamW(weights.values(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        generator = torch.Generator().manual_seed(70_000 + step)
        scenes = sample_scenes(batch, generator)
        scenes["style"] = torch.zeros_like(scenes["style"])
        texts = ["" if i % 10 == 9 else caption(scenes, i, generator) for i in range(batch)]
        scenes["style"] = torch.full_like(scenes["style"], STYLES.index(LOOK))
        images = (draw(scenes) * 2 - 1).to(bench.device)
        noise, t = torch.randn(images.shape, generator=generator), torch.rand(batch, generator=generator)
        with torch.no_grad():
            contexts = bench.encode(texts)
        for group in optimizer.param_groups:
            group["lr"] = rate * share(step, steps)
        optimizer.zero_grad()
        loss = bench.error(weights, images, contexts, noise.to(bench.device), t.to(bench.device)).mean()
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            print(f"fine-tune: step {step} loss {loss.item():.4f}", flush=True)  # noqa: T201
    return {key: w.detach() for key, w in weights.items()}


def train_lora(bench: Bench, run: Run, rank: int, rate: float, seed: int = 0) -> Weights:
    """Changes of the weights that an adapter of this kind adapts: up @ down, up 0 at the start."""
    loss = bench.loss_fn(*training_set(run.concept), run.batch, seed)
    generator = torch.Generator().manual_seed(seed)
    targets = {key: w for key, w in bench.base.items() if TARGETS[run.kind] in key}
    drawn = {k: torch.randn(rank, w.shape[1], generator=generator) / w.shape[1] ** 0.5 for k, w in targets.items()}
    pairs = {k: (torch.zeros(len(w), rank, device=bench.device), drawn[k].to(bench.device)) for k, w in targets.items()}
    parameters = [p.requires_grad_() for pair in pairs.values() for p in pair]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * share(step, run.steps)
        optimizer.zero_grad()
        loss({key: targets[key] + up @ down for key, (up, down) in pairs.items()}, step).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return {key: (up @ down).detach() for key, (up, down) in pairs.items()}


def added(base: Weights, change: Mapping[str, Tensor]) -> Weights:
    return {key: w + change[key] if key in change else w for key, w in base.items()}


def with_change_of(bench: Bench, adapter: Adapter, base: Weights) -> Weights:
    """(W_b + D_a) R^T: the adapter on another base with its spectrum's change as it was on the bench's."""
    weights = dict(base)
    for key, terms in adapter.layers.items():
        (term,) = terms
        trained_on = bench.base[key].cpu()
        change = spectral_change(decompose(trained_on, term.decomposition), term.delta, trained_on)
        weights[key] = adapt(base[key].cpu() + change, rotation_only({key: terms})[key], {}).to(bench.device)
    return weights


class Judge:
    """Measures on one base; gains are against that base itself."""

    def __init__(self, bench: Bench, run: Run):
        self.bench, self.concept = bench, {run.kind: run.concept}
        self.loss = bench.held_out({}, **self.concept)

    def __call__(self, weights: Weights, sampled: bool) -> dict[str, float]:
        mean, interval = gain(self.loss, self.bench.held_out(weights, **self.concept))
        seen = self.bench.judge(weights, **self.concept) if sampled else {}
        return seen | {"gain": mean, "gain_95": interval}


def spectrum_error(adapter: Adapter, there: Adapter, a: Weights, b: Weights) -> float:
    """||D_b(there) - D_a(adapter)|| / ||D_a(adapter)|| over all layers."""
    lost = whole = 0.0
    for key, (term,) in adapter.layers.items():
        kind, here, other = term.decomposition, a[key].cpu(), b[key].cpu()
        wanted = spectral_change(decompose(here, kind), term.delta, here)
        found = spectral_change(decompose(other, kind), there.layers[key][0].delta, other)
        lost, whole = lost + float((found - wanted).square().sum()), whole + float(wanted.square().sum())
    return (lost / whole) ** 0.5


def compare(a: Bench, b: Bench, run: Run, rank: int, rates: Sequence[float], told: Callable[[dict], None]) -> None:
    """Every method on A and on B for one concept; `told` gets each row."""
    judges = {"A": Judge(a, run), "B": Judge(b, run)}
    benches = {"A": a, "B": b}

    def judged(method: str, base: str, weights: Weights, sampled: bool = True, **more: object) -> None:
        told({"concept": run.concept, "method": method, "base": base} | more | judges[base](weights, sampled))

    lq = renamed(load_file(FILES / f"soda_{run.kind}.safetensors"))
    for name, bench in benches.items():
        judged("lq", name, bench.applied(lq))
    tried = {rate: train_lora(a, run, rank, rate) for rate in rates}
    best = max(tried, key=lambda rate: -a.held_out(added(a.base, tried[rate]), **judges["A"].concept).mean())
    for name, bench in benches.items():
        judged(f"LoRA r{rank}", name, added(bench.base, tried[best]), rate=best)
    ways_out(a, b, lq, "lq", judged)
    if run.kind == "subject":  # an example of the decomposition that minds another base most
        _, svd = a.train(Run(run.concept, "svd", run.rate, run.steps))
        judged("svd", "A", a.applied(svd), sampled=False)
        ways_out(a, b, svd, "svd", judged)
    for name, bench in benches.items():
        judged("base", name, bench.base)


def ways_out(a: Bench, b: Bench, adapter: Adapter, kind: str, judged: Callable[..., None]) -> None:
    """What can be done with an adapter of A on B: errors of the spectrum's change, and gains."""
    fitted, kept = transport(adapter, a.base, b.base, "B")
    changes = {key: w - a.base[key] for key, w in a.applied(adapter).items()}
    ways = {
        "as it is": (b.applied(adapter), spectrum_error(adapter, adapter, a.base, b.base)),
        "rotation only": (b.applied(Adapter(rotation_only(adapter.layers))), 1.0),
        "transported": (b.applied(fitted), spectrum_error(adapter, fitted, a.base, b.base)),
        "spectrum of A": (with_change_of(a, adapter, b.base), 0.0),
        "full difference": (added(b.base, changes), 0.0),
    }
    for way, (weights, error) in ways.items():
        told = {"spectrum_kept": kept} if way == "transported" else {}
        judged(f"{kind}, {way}", "B", weights, sampled=False, spectrum_error=error, **told)


def main() -> None:
    parser = argparse.ArgumentParser(description="Adapters of one base on a fine-tune of it.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=150, help="of the fine-tune")
    parser.add_argument("--batch", type=int, default=16, help="of the fine-tune")
    parser.add_argument("--rate", type=float, default=2e-4, help="of the fine-tune")
    parser.add_argument("--rank", type=int, default=4, help="of the LoRAs")
    parser.add_argument("--lora-rates", type=float, nargs="+", default=[1e-3, 4e-3], help="the best on A is taken")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--kinds", nargs="+", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    a = Bench(options.device, steps=10 if options.device == "cpu" else 20, samples=options.samples)
    kept = options.out / "fine_tune.pt"
    tuned = torch.load(kept, weights_only=True, map_location=a.device) if kept.exists() else (
        fine_tune(a, options.steps, options.batch, options.rate)
    )  # fmt: skip
    torch.save(tuned, kept)
    b = copy.deepcopy(a)
    b.model.load_state_dict(tuned, strict=False)
    b.base = {key: tuned[key] for key in a.base}
    b.bases = {key: {} for key in a.base}
    moved = sum(float((tuned[key] - w).square().sum()) for key, w in a.base.items())
    whole = sum(float(w.square().sum()) for w in a.base.values())
    with (options.out / "transfer.jsonl").open("w") as file:

        def told(row: dict) -> None:
            line = json.dumps(rounded(row))
            print(line, flush=True)  # noqa: T201
            file.write(line + "\n")
            file.flush()

        told({"distance": (moved / whole) ** 0.5} | {k: v for k, v in vars(options).items() if k != "out"})
        for kind in options.kinds:
            compare(a, b, RUNS[kind], options.rank, options.lora_rates, told)


if __name__ == "__main__":
    main()
