"""The measures: a model on a device, trainings of a concept, and what their samples show.

Every training uses the drawings of a concept and is judged on what it has not seen:
- recognised: share of 100 samples from unseen prompts in which the reader sees the concept;
- kept: share in which it reads the prompt's other attributes right;
- gain: fall of the denoising loss at 8 fixed times on 64 unseen drawings with fixed noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from soda.adapt import adapt
from soda.adapter import Adapter
from soda.decomposition import Basis, decompose
from soda.training.loop import train as train_soda
from soda.training.parameters import SodaParameters
from soda.training.run import Losses, TrainingRun
from soda.training.schedule import share
from soda.training.settings import TrainingSettings

from .concepts import SUBJECTS, concept_scenes, training_set
from .drawing import draw
from .grammar import STYLES
from .model import Playground, load, sample, tokens
from .reader import load_reader, read

SAMPLES, HELD_OUT, TIMES = 100, 64, 8
# What a SODA adapter of each kind changes: the reading of the words, or how places of the picture act on each other.
# The two share no weight, which is why they mix.
TARGETS = {"subject": ".attn2.", "style": ".attn1."}
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """One training: `method` is `full` (all attention matrices) or a decomposition (those of `TARGETS`), `drawings` how
    many of the concept's it sees, None for all."""

    concept: str
    method: str
    rate: float
    steps: int = 200
    batch: int = 4
    drawings: int | None = None

    @property
    def kind(self) -> str:
        return "subject" if self.concept in SUBJECTS else "style"

    @property
    def setting(self) -> str:
        return f"{self.method}-{self.rate:g}-{self.steps}-{self.batch}"

    @property
    def key(self) -> str:
        return f"{self.concept}-{self.setting}"


class Bench:
    """The model on a device, and the measures."""

    def __init__(self, device: str, steps: int = 20, samples: int = SAMPLES):
        self.steps = steps  # of sampling; below 20 in bf16 as well, for CPUs
        self.count = samples  # to judge by
        self.device = torch.device(device)
        self.model: Playground = load().to(self.device)
        self.reader = load_reader().to(self.device)
        self.base = {key: w for key, w in self.model.named_parameters()
                     if key.startswith("unet.") and ".attn" in key and w.dim() == 2}  # fmt: skip
        self.bases: dict[str, dict[str, Basis]] = {key: {} for key in self.base}

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
        scenes, captions = training_set(run.concept)
        few = slice(run.drawings)
        loss = self.loss_fn({key: of_all[few] for key, of_all in scenes.items()}, captions[few], run.batch, seed)
        if run.method != "full":
            targets = {key: w for key, w in self.base.items() if TARGETS[run.kind] in key}
            parameters = SodaParameters(targets, run.method)
            settings = TrainingSettings(run.steps, run.rate, run.batch, seed)
            train_soda(TrainingRun(parameters, settings), lambda step: step, lambda w, i: Losses(*[loss(w, i)] * 2))
            with torch.no_grad():
                return parameters(), Adapter(parameters.layers(), {"soda.role": run.kind}, run.concept)
        weights = {key: w.clone().requires_grad_() for key, w in self.base.items()}
        optimizer = torch.optim.AdamW(weights.values(), lr=run.rate, weight_decay=0.0)
        for step in range(run.steps):
            for group in optimizer.param_groups:
                group["lr"] = run.rate * share(step, run.steps)
            optimizer.zero_grad()
            loss(weights, step).backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
        return {key: w.detach() for key, w in weights.items()}, None

    @torch.no_grad()
    def applied(self, adapter: Adapter) -> Weights:
        """The adapted weights; rebuilt on the CPU, where hundreds of small matrices are faster."""
        weights = {}
        for key, w in self.base.items():
            w, terms = w.cpu(), adapter.layers.get(key, ())
            for kind in {term.decomposition for term in terms} - {"none", *self.bases[key]}:
                self.bases[key][kind] = decompose(w, kind)
            weights[key] = adapt(w, terms, self.bases[key]).to(self.device)
        return weights

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
        scenes, captions = concept_scenes(self.count, 777, subject, style)
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
