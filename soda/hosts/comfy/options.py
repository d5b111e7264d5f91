"""What travels on a SODA_TRAIN_OPTIONS socket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...training.settings import TrainingSettings
from .augment import Augment
from .memory import AUTO


@dataclass(frozen=True)
class TrainingOptions:
    """settings: fields of `TrainingSettings` by name. layers: a pattern over layer names, "" for all.
    sample_every: steps from one sample to the next, 0 for one at each quarter. memory: one of `memory.MEMORY`.

    Raises SodaTrainingError for settings out of range.
    """

    settings: Mapping[str, Any]
    layers: str = ""
    augment: Augment | None = None
    sample_every: int = 0
    memory: str = AUTO

    def __post_init__(self) -> None:
        TrainingSettings(**self.settings)
