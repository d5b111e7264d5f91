"""Which memory plan a training on a ComfyUI model takes, and the model loaded for it (`soda.training.plan`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ...adapter import Decomposition
from ...training.plan import PLANS, Plan, choose, needs
from ...training.settings import TrainingSettings
from .base import layer_shape
from .dataset import Sample

AUTO = "auto"
MEMORY = (AUTO, *PLANS)
EVERYTHING = 1e20  # bytes to keep free, for which ComfyUI leaves all weights in main memory
GB = 1e9
MIB = 1 << 20


@dataclass(frozen=True)
class Memory:
    """Bytes: what each plan needs on the training device, and what is free there or can be made so."""

    needed: Mapping[Plan, float]
    free: float
    device: torch.device

    @classmethod
    def of(
        cls, networks: Mapping[ModelPatcher, Iterable[str]], samples: Sequence[Sample], prior: Sequence[Sample],
        settings: TrainingSettings, decomposition: Decomposition,
    ) -> Memory:  # fmt: skip
        """Of networks with the layers to train in each: the diffusion model, then its text encoder, if that trains."""
        patcher, *_ = networks
        sampling = _sampling(patcher, samples, settings) + (_sampling(patcher, prior, settings) if prior else 0.0)
        parts = []
        for network, layers in networks.items():
            shapes = [layer_shape(network, layer) for layer in layers]
            dtype, passes = (computing_dtype(network), sampling) if network is patcher else (torch.float32, 0.0)
            parts.append(needs(shapes, decomposition, dtype, network.model_size(), passes))
        needed = {plan: sum(part[plan] for part in parts) for plan in PLANS}
        return cls(needed, _free(patcher), patcher.load_device)

    def plan(self, wanted: str) -> Plan:
        """The plan asked for; by `auto` the fastest that fits."""
        return next((plan for plan in PLANS if plan == wanted), None) or choose(self.needed, self.free)

    def text(self, plan: Plan) -> str:
        """A sentence for the node."""
        return f"Memory plan: {plan}, about {self.needed[plan] / GB:.1f} GB of {self.free / GB:.1f} GB free."

    def load(self, networks: Sequence[ModelPatcher], plan: Plan) -> None:
        """Load the networks as the plan needs them; on a CPU always whole."""
        if plan == "low VRAM":
            comfy.model_management.load_models_gpu(networks, EVERYTHING)
        else:
            beside = self.needed[plan] - sum(network.model_size() for network in networks)
            comfy.model_management.load_models_gpu(networks, beside, force_full_load=True)


def ran_out(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on a GPU, or in the words that torch has for a CPU."""
    oom = comfy.model_management.is_oom(error) or isinstance(error, MemoryError)
    return oom or "DefaultCPUAllocator" in str(error)


def computing_dtype(patcher: ModelPatcher) -> torch.dtype:
    """What the adapted weights are made in: the dtype the model computes in, fp32 if that is no half precision."""
    dtype = patcher.model.get_dtype_inference()
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def _sampling(patcher: ModelPatcher, samples: Sequence[Sample], settings: TrainingSettings) -> float:
    """What a forward pass of a batch takes without gradients: ComfyUI's estimate for fused attention, with which
    training computes everywhere (its own for a CPU is eight times as much)."""
    places = settings.batch_size * max(s.latent.shape[2:].numel() for s in samples)
    size = computing_dtype(patcher).itemsize
    return places * size * 0.01 * patcher.model.memory_usage_factor * MIB


def _free(patcher: ModelPatcher) -> float:
    """What is free, or held by models that ComfyUI would unload, this one included."""
    device = patcher.load_device
    free = comfy.model_management.get_free_memory(device)
    if comfy.model_management.is_device_cpu(device):
        return free + patcher.model_size()
    held = (loaded for loaded in comfy.model_management.current_loaded_models if loaded.device == device)
    return free + sum(loaded.model_loaded_memory() for loaded in held)
