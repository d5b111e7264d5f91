"""The two sides that put adapters onto an SDXL of ComfyUI's own classes: core's LoRA loader and SODA's nodes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from train_step import COMMON, MODELS, load_pack

SMALL = ("SDXL", COMMON | {
    "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 2],
    "transformer_depth_output": [1, 1, 2, 2], "transformer_depth_middle": 2, "context_dim": 256,
    "use_linear_in_transformer": True, "adm_in_channels": 2816, "num_classes": "sequential",
    "num_head_channels": 32})  # fmt: skip


class Case:
    """The model, made anew from the same numbers whenever asked for, and adapter files for it."""

    def __init__(self, device: torch.device, small: bool, folder: Path):
        self.device, self.small, self.folder = device, small, folder
        self.state: dict[str, torch.Tensor] = {}

    def patcher(self) -> Any:
        import comfy.model_patcher
        import comfy.supported_models

        name, unet = SMALL if self.small else MODELS["sdxl"]
        config = getattr(comfy.supported_models, name)(dict(unet, dtype=torch.float16))
        config.set_inference_dtype(torch.float16, torch.float32 if self.device.type == "cpu" else None)
        if not self.state:
            import comfy.memory_management

            dynamic, comfy.memory_management.aimdo_enabled = comfy.memory_management.aimdo_enabled, False
            model = config.get_model({}, "", device=torch.device("cpu"))
            generator = torch.Generator(self.device).manual_seed(0)
            for key, parameter in model.named_parameters():
                self.state[key] = self._numbers(key, parameter, generator)
            comfy.memory_management.aimdo_enabled = dynamic  # under which modules have no weights of their own
        model = config.get_model({}, "", device=torch.device("cpu"))
        model.load_state_dict({key: value.clone() for key, value in self.state.items()}, strict=False, assign=True)
        return comfy.model_patcher.CoreModelPatcher(model, load_device=self.device, offload_device=torch.device("cpu"))

    def _numbers(self, key: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if parameter.ndim < 2:
            return torch.full(parameter.shape, float(key.endswith("weight")), dtype=torch.float16)
        numbers = torch.empty(parameter.shape, device=self.device).normal_(generator=generator)
        return (numbers * parameter.shape[1:].numel() ** -0.5).half().cpu()

    def files(self, kind: str, count: int) -> list[Path]:
        return [self._file(kind, seed) for seed in range(count)]

    def _file(self, kind: str, seed: int) -> Path:
        from pack.adapter import Adapter, Layer
        from pack.file import save
        from pack.kronecker import factor_sizes
        from safetensors.torch import save_file

        path = self.folder / f"{kind}{seed}.safetensors"
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) * 0.02

        tensors, layers = {}, {}
        for layer, shape in self.shapes().items():
            if kind == "lora":
                tensors[f"{layer}.lora_up.weight"] = normal(shape[0], 32).half()
                tensors[f"{layer}.lora_down.weight"] = normal(32, shape[1]).half()
                continue
            delta = None if kind == "none" else normal(min(shape))
            logs = tuple(normal(n * (n - 1) // 2) for n in factor_sizes(shape[1], 3))
            layers[layer] = (Layer(kind, delta, logs, None if delta is None else torch.zeros(8, 8)),)
        if kind == "lora":
            save_file(tensors, path)
        else:
            save(Adapter(layers), path)
        return path

    def shapes(self) -> dict[str, torch.Size]:
        from pack.hosts.comfy.targets import attention_weights

        patcher = self.patcher()
        weights = patcher.model_state_dict()
        return {layer: weights[key].shape for layer, key in attention_weights(patcher).items()}


class Core:
    """LoRAs as *Load LoRA* puts them on: the file kept by the node, keys matched at every run."""

    def __init__(self, files: list[Path]):
        self.files, self.known, self.held = files, {}, None

    def forget(self, what: str) -> None:
        self.known.clear()

    def apply(self, model: Any, weights: list[float]) -> Any:
        import comfy.sd
        import comfy.utils

        for file, weight in zip(self.files, weights, strict=False):
            if file not in self.known:
                self.known[file] = comfy.utils.load_torch_file(str(file), safe_load=True)
            model, _ = comfy.sd.load_lora_for_models(model, None, self.known[file], weight, 0)
        return model

    def bytes(self, patched: Any) -> int:
        return 0


class Soda:
    """What SODA Loader and SODA Mix do."""

    def __init__(self, files: list[Path]):
        from pack.hosts.comfy.base import CACHE

        self.files, self.cache, self.held = files, CACHE, None

    def forget(self, what: str) -> None:
        from pack.hosts.comfy import fit, folders

        if what in ("memory", "disk"):
            memory, disk = self.cache.memory, self.cache._folder.limit
            self.cache.bound(0, disk if what == "memory" else 0)
            self.cache.bound(memory, disk)
        fit._ERRORS.clear()
        folders._read.cache_clear()

    def apply(self, model: Any, weights: list[float]) -> Any:
        from pack.hosts.comfy import folders, patch

        parts = []
        for file, weight in zip(self.files, weights, strict=False):
            stat = os.stat(file)
            parts.append((folders._read(str(file), stat.st_size, stat.st_mtime_ns), weight))
        return patch.apply(model, parts)[0]

    def bytes(self, patched: Any) -> int:
        """Of bases in memory, and of changes kept for every forward of a model."""
        fold, _, _ = next(iter(patched.patches.values()))[0][1].weights
        return self.cache.size + sum(change.data.nbytes for change in fold._changes.values())


def dynamic_vram() -> None:
    """As ComfyUI's main.py puts it on; before anything of ComfyUI is imported."""
    import comfy_aimdo.control

    comfy_aimdo.control.init()
    comfy_aimdo.control.set_log_warning()
    load_pack()
    import comfy.memory_management
    import comfy.model_patcher

    assert comfy_aimdo.control.init_devices([torch.cuda.current_device()]), "no dynamic VRAM on this machine"
    comfy.memory_management.aimdo_enabled = True
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
