"""What the tests of SODA Train share: short trainings on small models, and whether these are as they were."""

from __future__ import annotations

import comfy.model_management
import torch
from small_models import conditioning, latents, load, same, weights
from soda_pack.soda.hosts.comfy import dataset
from soda_pack.soda.hosts.comfy.batches import Batches
from soda_pack.soda.hosts.comfy.diffusion import mean_error
from soda_pack.soda.hosts.comfy.progress import TrainingProgress
from soda_pack.soda.hosts.comfy.task import Extras, Task
from soda_pack.soda.hosts.comfy.train import train_adapter, train_or_reuse
from soda_pack.soda.training.settings import TrainingSettings

PLAIN = Extras()


class Watcher(TrainingProgress):
    """Progress without a server; `at` is called in every step."""

    def __init__(self, steps, at=lambda step: None):
        super().__init__(steps, None)
        self.at = at
        self.previews = []
        self.seen, self.restored = [], []

    def restore(self, losses, samples=()):
        self.restored = list(losses)
        super().restore(losses, samples)

    def step(self, step, loss):
        super().step(step, loss)
        self.seen.append(step)
        self.at(step)

    def preview(self, step, image):
        self.previews.append((step, image))
        super().preview(step, image)


def data(count=3):
    return dataset.collect([latents(count)], [conditioning()])


def run(model, steps=6, seed=0, decomposition="lq", factors=3, samples=None, progress=None, rate=0.01, batch=2,
        prompt=None, targets="all attention", extras=PLAIN, memory="auto", **settings):  # fmt: skip
    settings = TrainingSettings(steps=steps, learning_rate=rate, batch_size=batch, seed=seed, **settings)
    task = Task(model, samples or data(), settings, decomposition, factors, targets=targets, extras=extras)
    with torch.inference_mode():
        return train_adapter(task, progress or Watcher(steps), prompt, memory=memory)


def kept(model, steps=12, progress=None, samples=None, role="subject", targets="auto", extras=PLAIN, reuse=True,
         prompt=None, **settings):  # fmt: skip
    """A training whose run is kept on disk."""
    settings = TrainingSettings(**{"steps": steps, "learning_rate": 0.02, "batch_size": 2, **settings})
    task = Task(model, samples or data(), settings, role=role, targets=targets, extras=extras)
    with torch.inference_mode():
        return train_or_reuse(task, progress or Watcher(steps), prompt, reuse)


def untouched(model, before):
    """The model is as it was: weights, functions on modules, injections, ComfyUI's training flag."""
    load(model)
    assert same(before, weights(model))
    functions = [getattr(m, "weight_function", []) for m in model.model.modules()]
    assert not any(functions)
    assert not model.injections and not comfy.model_management.in_training
    assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())
    return True


def loss_of(patcher, samples, batch=16, seed=77, steps=4):
    """The model's loss on fixed noise and noise levels."""
    load(patcher)
    with torch.inference_mode(False), torch.no_grad():
        patcher.pre_run()
        batches = Batches(patcher, samples, TrainingSettings(batch_size=batch, seed=seed))
        value = sum(float(mean_error(patcher, batches(step).passes)) for step in range(steps)) / steps
        patcher.cleanup()
    return value
