"""Which layers a training adapts: targets, or what the role suggests, then a pattern over their names; all of the
attention of a text encoder that trains along."""

from __future__ import annotations

from fnmatch import fnmatchcase

from comfy.model_patcher import ModelPatcher

from ...errors import SodaTrainingError
from ...training.presets import TARGETS
from .quantised import untrainable
from .targets import attention_weights, text_attention_weights

AUTO = "auto"


def resolve(patcher: ModelPatcher, targets: str, role: str) -> str:
    """The targets that `auto` stands for; all attention where the model does not tell its kinds apart."""
    if targets != AUTO:
        return targets
    try:
        attention_weights(patcher, TARGETS[role])
    except SodaTrainingError:
        return "all attention"
    return TARGETS[role]


def chosen_weights(patcher: ModelPatcher, targets: str, pattern: str) -> dict[str, str]:
    """Layer name -> state dict key; of the targets' layers those whose name matches `pattern` (*, ? and [abc] as in
    file names, "" for all). Raises SodaTrainingError if there is none, or if a weight of the model lets no gradient
    pass."""
    known = attention_weights(patcher, targets)
    _must_let_gradients_pass(patcher)
    if not pattern:
        return known
    found = {layer: key for layer, key in known.items() if fnmatchcase(layer, pattern)}
    if not found:
        names = list(known)
        some = ", ".join(names[:: max(1, len(names) // 3)][:3])
        raise SodaTrainingError(
            f"layers is {pattern!r}, which matches none of the {len(names)} layers of {targets}. Some of them: {some}. "
            "Write * where names may differ, or leave layers empty for all."
        )
    return found


def chosen_text_weights(patcher: ModelPatcher) -> dict[str, str]:
    """The same for the patcher of a CLIP, of which all attention is trained."""
    _must_let_gradients_pass(patcher)
    return text_attention_weights(patcher)


def _must_let_gradients_pass(patcher: ModelPatcher) -> None:
    form = next(filter(None, map(untrainable, patcher.model.parameters())), None)
    if form is not None:
        raise SodaTrainingError(
            f"A model in {form} cannot be trained on. Train on the same model in fp16, bf16 or fp8; the adapter then "
            f"works on the {form} model too."
        )
