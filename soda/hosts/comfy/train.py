"""Training a SODA adapter on a ComfyUI model that is in memory, without a second copy of it.

The model is used as it is loaded; its weights are read, never written, and everything is put back when training
ends, fails or is interrupted.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ...adapter import Adapter, Layer
from ...errors import SodaFileError, SodaTrainingError
from ...training.layers import added, difference, put
from ...training.loop import Keep, train
from ...training.parameters import SodaParameters
from ...training.plan import Plan, after
from ...training.run import Diverged, TrainingRun
from .base import TrainableWeights
from .batches import Batches
from .beside import take_off
from .dataset import Sample
from .describe import training_metadata
from .differentiable import differentiated
from .diffusion import DiffusionLosses, transformer_options
from .identity import layer_hashes
from .inject import Injection
from .memory import AUTO, Memory, computing_dtype, ran_out
from .preview import SamplePrompt, show_sample
from .progress import TrainingProgress
from .store import KeptRun
from .task import Networks, Task
from .text_encoder import TextEncoder
from .trainable import trainable, training_state

FP16_SCALE = 1024.0
NOT_KEPT = "This run is not kept on disk"


def train_or_reuse(
    task: Task, progress: TrainingProgress, prompt: SamplePrompt | None = None, reuse: bool = True, memory: str = AUTO
) -> tuple[Adapter, list[float]]:
    """`train_adapter`, whose run is kept on disk under a hash of all its inputs.

    With `reuse` the same inputs give back the finished adapter, or go on from the last checkpoint. Both are said on
    the node.
    """
    kept = KeptRun(task.hash())
    found = kept.finished() if reuse else None
    if found is not None:
        progress.note("The same inputs were trained before: this is that adapter. Turn reuse off to train anew.")
        progress.restore(found[1])
        return found
    adapter, losses = train_adapter(task, progress, prompt, kept, reuse, memory)
    if len(losses) < task.settings.steps:
        progress.note(f"Stopped after step {len(losses)} of {task.settings.steps}; the adapter is as it was then.")
    else:
        with _told(progress):
            kept.finish(adapter, losses)
    return adapter, losses


def train_adapter(
    task: Task, progress: TrainingProgress, prompt: SamplePrompt | None = None, kept: KeptRun | None = None,
    resume: bool = False, memory: str = AUTO,
) -> tuple[Adapter, list[float]]:  # fmt: skip
    """(adapter, loss of every step).

    The same inputs and seed give the same tensors on a CPU, also where the run was interrupted and resumed: with
    `kept` it leaves checkpoints, with `resume` it goes on from the last one.

    `memory` is one of `memory.MEMORY`. A plan whose memory runs out is followed by the next more frugal one, on from
    the last step where the run is kept; that is said on the node.

    LoRA patches on the model stay active while it trains, and so do SODA adapters: the new one is trained as one more
    part of their mix (see `beside`). Raises SodaTrainingError for what cannot be trained, a run that diverged, and
    where memory runs out.
    """
    networks = task.networks()
    if kept is not None and not resume:
        kept.drop_checkpoint()
    while True:
        budget = Memory.of(networks, task.samples, task.extras.prior, task.settings, task.decomposition)
        plan: Plan = budget.plan(memory)
        if plan != "fast" or not comfy.model_management.is_device_cpu(budget.device):
            progress.note(budget.text(plan))
        try:
            with trainable(networks) as clones:
                loaded = dict(zip(clones, networks.values(), strict=True))
                layers, losses = _train(task, loaded, progress, prompt, kept, resume, budget, plan)
            return Adapter(layers, _metadata(task, networks, progress), "trained adapter"), losses
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
        _release()  # now that the error is gone, and with it the tensors that its frames hold
        following = after(plan)
        if following is None:
            raise SodaTrainingError(_too_little(task))
        progress.note(f"The memory was not enough for the plan {plan}.")
        memory, resume = following, True


def _metadata(task: Task, networks: Networks, progress: TrainingProgress) -> dict[str, str]:
    hashes = {name: value for network, keys in networks.items() for name, value in layer_hashes(network, keys).items()}
    sample = progress.strip.samples[-1][1] if progress.strip.samples else None
    return training_metadata(task, hashes, sample)


def _release() -> None:
    gc.collect()
    comfy.model_management.soft_empty_cache()


def _too_little(task: Task) -> str:
    sizes, batch = " and ".join(task.latent_sizes()), task.settings.batch_size
    return (
        f"The memory of {task.model.load_device} is not enough for batches of {batch} at latent size {sizes}. Lower "
        "batch_size (and raise accumulation in SODA Train Options instead), use smaller images, or close what else "
        "uses this device. The model is as it was; with reuse on, the same inputs go on from the last step."
    )


def _train(
    task: Task, clones: Networks, progress: TrainingProgress, prompt: SamplePrompt | None, kept: KeptRun | None,
    resume: bool, memory: Memory, plan: Plan,
) -> tuple[Mapping[str, tuple[Layer, ...]], list[float]]:  # fmt: skip
    """Trains on clones of the networks, which it loads."""
    settings, extras = task.settings, task.extras
    if settings.caption_dropout and extras.empty is None:
        raise SodaTrainingError("caption_dropout needs the empty caption: wire a clip into SODA Train, or set it to 0.")
    (patcher, keys), *others = clones.items()
    text = TextEncoder(extras.clip, *others[0]) if others else None
    frozen = {name: terms for clone, keys in clones.items() for name, terms in take_off(clone, keys).items()}
    load = partial(memory.load, list(clones), plan)
    load()
    # Nodes run under inference mode, whose tensors know no gradients.
    with torch.inference_mode(False), torch.enable_grad(), training_state(clones):
        dtype = computing_dtype(patcher)
        weights = TrainableWeights(clones)
        of_text = {name for _, keys in others for name in keys}
        parameters = SodaParameters(
            weights, task.decomposition, task.factors, dtype=dtype, plan=plan, text=of_text, bases=weights.bases
        )
        reference, beside = _start(parameters, weights, frozen, extras.start_from)
        batches = Batches(patcher, task.samples, settings, extras.empty, extras.prior, words=text is not None)
        with Injection(patcher, keys, again=plan != "fast") as injection, text or contextlib.nullcontext():
            transformer_options(patcher)
            losses_of = DiffusionLosses(patcher, injection, settings, reference, text)
            recorded = plan == "fast" and text is None and patcher.load_device.type == "cuda"
            run = TrainingRun(parameters, settings, FP16_SCALE if dtype == torch.float16 else 1.0, recorded)
            if kept is not None and resume:
                _resume(run, kept, progress)

            def batch_of(index: int):
                comfy.model_management.throw_exception_if_processing_interrupted()
                injection.weights = {}  # some networks prepare captions by attention of their own, once for all steps
                return batches(index)

            watch = _Watch(progress, run, injection, patcher, prompt, task.samples, load, text)
            try:
                losses = differentiated(lambda: train(run, batch_of, losses_of, watch, _keeper(kept, progress)))
            except Diverged as error:
                raise SodaTrainingError(f"{error}{_last_good(run, kept)}") from error
        return difference(parameters.layers(), frozen, beside), losses


def _start(
    parameters: SodaParameters, weights: Mapping[str, torch.Tensor], frozen: dict[str, tuple[Layer, ...]],
    start_from: Adapter | None,
) -> tuple[Mapping[str, torch.Tensor], dict[str, tuple[Layer, ...]]]:  # fmt: skip
    """Set the parameters to the frozen adapters and the one to go on from.

    Returns what the frozen ones alone give: the weights, and the layers.
    """
    reference, beside = parameters.base_weights(), {}
    if frozen:
        put(parameters, frozen)
        beside = parameters.layers()
        reference = parameters.snapshot()
    if start_from is not None:
        outside = [name for name in start_from.layers if name not in weights]
        if outside:
            raise SodaTrainingError(
                f"start_from is an adapter of {len(start_from.layers)} layers, of which {len(outside)} are not trained "
                f"here (first {outside[0]}). Choose targets and layers that hold all of them, and a text_encoder_rate "
                "where it has layers of a text encoder."
            )
        put(parameters, added(frozen, start_from.layers) if frozen else start_from.layers)
    return reference, beside


def _resume(run: TrainingRun, kept: KeptRun, progress: TrainingProgress) -> None:
    try:
        state = kept.checkpoint()
    except SodaFileError as error:
        progress.note(f"Training starts at the first step: {error}")
        return
    if state is not None:
        run.load_state_dict(state)
        progress.restore(run.losses, state.get("samples", ()))
        progress.note(f"Went on from step {run.step} of a run with the same inputs that had not ended.")


def _last_good(run: TrainingRun, kept: KeptRun | None) -> str:
    """Keeps the adapter of a run that diverged; where, as the end of a sentence on it."""
    if kept is None:
        return "."
    kept.drop_checkpoint()
    if not run.step:
        return "."
    try:
        path = kept.keep_last_good(Adapter(run.parameters.layers(), {}, "last good"))
    except SodaFileError as error:
        return f". The adapter as it was after step {run.step} could not be kept: {error}"
    return f". The adapter as it was after step {run.step} is kept in {path}."


def _keeper(kept: KeptRun | None, progress: TrainingProgress) -> Keep | None:
    if kept is None:
        return None

    def keep(state: dict[str, Any]) -> None:
        with _told(progress):
            kept.keep({**state, "samples": progress.strip.state()})

    return keep


@contextlib.contextmanager
def _told(progress: TrainingProgress) -> Iterator[None]:
    """What cannot be written to disk is said on the node: it is no reason to lose a training."""
    try:
        yield
    except SodaFileError as error:
        if not any(note.startswith(NOT_KEPT) for note in progress.notes):
            progress.note(f"{NOT_KEPT}: {error}")


class _Watch:
    """The node's progress as a run sees it, with samples on the way."""

    def __init__(
        self, progress: TrainingProgress, run: TrainingRun, injection: Injection, patcher: ModelPatcher,
        prompt: SamplePrompt | None, samples: Sequence[Sample], reload: Callable[[], None], text: TextEncoder | None,
    ):  # fmt: skip
        self.progress, self.run, self.injection, self.patcher = progress, run, injection, patcher
        self.prompt, self.samples, self.reload, self.text = prompt, samples, reload, text
        self.note, self.stop_requested = progress.note, progress.stop_requested

    def step(self, step: int, loss: float) -> None:
        self.progress.step(step, loss)
        prompt = self.prompt
        if prompt is not None and prompt.due(step, self.run.settings.steps):
            self.run.moved()
            with torch.no_grad(), self.run.settled():  # to the end: some plans make the weights where they are needed
                self.injection.weights = weights = self.run.parameters()
                if self.text is not None:
                    self.text.weights = weights
                    prompt = replace(prompt, clip=self.text.clip)  # to be encoded anew
                show_sample(self.patcher, prompt, self.samples[0].shapes, step, self.progress, self.reload)
