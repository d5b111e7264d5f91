"""Training a SODA adapter on a ComfyUI model that is in memory, without a second copy of it.

The model is used as it is loaded; its weights are read, never written, and everything is put back when training
ends, fails or is interrupted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ...adapter import Adapter, Decomposition
from ...errors import SodaTrainingError
from ...training.loop import TrainingSettings
from ...training.loop import train as run_loop
from ...training.parameters import SodaParameters
from .base import unpatched
from .dataset import Sample
from .describe import training_metadata
from .diffusion import DiffusionLoss
from .inject import Injection
from .patch import attached
from .preview import SamplePrompt, show_sample
from .progress import TrainingProgress
from .targets import attention_weights


def train_adapter(
    model: ModelPatcher, samples: Sequence[Sample], settings: TrainingSettings, decomposition: Decomposition,
    factors: int, role: str, progress: TrainingProgress, prompt: SamplePrompt | None = None,
    targets: str = "all attention",
) -> tuple[Adapter, list[float]]:  # fmt: skip
    """(adapter, loss of every step); `targets` is a key of `targets.TARGETS`.

    The same inputs and seed give the same tensors on a CPU.

    LoRA patches on the model stay active while it trains. SODA patches are refused: two SODA adapters act through one
    mix, in which the new one would not do what it was trained to do.
    """
    if attached(model):
        raise SodaTrainingError(
            "The model already carries a SODA adapter. Wire the model that comes before SODA Loader or SODA Mix "
            "into SODA Train, and combine the two adapters afterwards with SODA Mix."
        )
    keys = attention_weights(model, targets)
    patcher = _trainable_clone(model)
    comfy.model_management.load_models_gpu([patcher], _memory(patcher, samples, settings), force_full_load=True)
    # Nodes run under inference mode, whose tensors know no gradients.
    with torch.inference_mode(False), torch.enable_grad(), _training_state(patcher):
        weights = {layer: unpatched(patcher, key).to(torch.float32) for layer, key in keys.items()}
        weights = {layer: w.clone() if w.is_inference() else w for layer, w in weights.items()}
        parameters = SodaParameters(weights, decomposition, factors).to(patcher.load_device)
        loss = DiffusionLoss(patcher, samples, settings.batch_size, settings.seed)
        with Injection(patcher, keys) as injection:

            def loss_fn(adapted: dict[str, torch.Tensor], step: int) -> torch.Tensor:
                comfy.model_management.throw_exception_if_processing_interrupted()
                injection.weights = adapted
                return loss(step)

            def on_step(step: int, value: float) -> bool:
                progress.step(step, value)
                if prompt is not None and prompt.due(step, settings.steps):
                    with torch.no_grad():
                        injection.weights = parameters()
                    show_sample(patcher, prompt, tuple(samples[0].latent.shape), step, progress)
                return progress.stop_requested()

            losses = run_loop(parameters, loss_fn, settings, on_step)
        layers = parameters.layers()
    metadata = training_metadata(model, samples, settings, decomposition, factors, role, targets, weights)
    return Adapter(layers, metadata, "trained adapter"), losses


def _trainable_clone(model: ModelPatcher) -> ModelPatcher:
    """A clone to load for training, on the same weights.

    A model with dynamic VRAM casts weights into buffers that the next layer reuses, which a backward pass cannot
    bear; as a plain ModelPatcher the same weights are loaded whole.
    """
    if model.is_dynamic():
        return model.clone(disable_dynamic=True, model_override=model.get_clone_model_override())
    return model.clone()


def _memory(patcher: ModelPatcher, samples: Sequence[Sample], settings: TrainingSettings) -> float:
    """Bytes to keep free for activations: a backward pass holds about four times what sampling needs."""
    shape = max((s.latent.shape for s in samples), key=lambda shape: shape.numel())
    return 4 * patcher.memory_required([settings.batch_size, *shape[1:]])


@contextlib.contextmanager
def _training_state(patcher: ModelPatcher) -> Iterator[None]:
    """ComfyUI told that a model trains; its flags and the patcher's run state put back at the end."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    patcher.pre_run()
    try:
        yield
    finally:
        comfy.model_management.in_training = before
        patcher.cleanup()
        if patcher.parent is not None and patcher.parent.is_dynamic():
            comfy.model_management.unload_model_and_clones(patcher)
