"""What a training is asked to do: the model, what it learns from, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from comfy.model_patcher import ModelPatcher

from ...adapter import Adapter, Decomposition
from ...training.settings import TrainingSettings
from .chosen import chosen_text_weights, chosen_weights, resolve
from .dataset import Sample
from .identity import run_hash

Networks = Mapping[ModelPatcher, dict[str, str]]  # with the weights to train: layer name -> state dict key


@dataclass(frozen=True)
class Extras:
    """What a training may have beside its samples.

    layers: a pattern over layer names, "" for all. start_from: the adapter whose weights it starts with. prior: samples
    on which the model shall stay as it is. empty: the empty caption, for caption dropout. clip: a CLIP to train as
    well, on the words of the captions, which the samples then know.
    """

    layers: str = ""
    start_from: Adapter | None = None
    prior: Sequence[Sample] = ()
    empty: list | None = None
    clip: Any = None


@dataclass(frozen=True)
class Task:
    """One training. `targets` is one of `targets.TARGETS`, or `auto`: what the role presets."""

    model: ModelPatcher
    samples: Sequence[Sample]
    settings: TrainingSettings
    decomposition: Decomposition = "lq"
    factors: int = 3
    role: str = "subject"
    targets: str = "all attention"
    extras: Extras = Extras()

    def resolved(self) -> str:
        """The targets, none of them `auto`."""
        return resolve(self.model, self.targets, self.role)

    def networks(self) -> Networks:
        """The diffusion model and then a CLIP's network, if that trains."""
        networks = {self.model: self._layers()}
        clip = self.extras.clip
        if clip is not None:
            networks[clip.patcher] = chosen_text_weights(clip.patcher)
        return networks

    def latent_sizes(self) -> list[str]:
        """As 64x48, each once; of several parts as 8x64x48+2x40."""
        said = {tuple("x".join(map(str, shape[2:])) for shape in sample.shapes) for sample in self.samples}
        return sorted("+".join(parts) for parts in said)

    def hash(self) -> str:
        """SHA-256 of all this."""
        return run_hash(
            self.model, self._layers(), self.samples, self.settings, self.decomposition, self.factors, self.role,
            self.extras,
        )  # fmt: skip

    def _layers(self) -> dict[str, str]:
        return chosen_weights(self.model, self.resolved(), self.extras.layers)
