"""A forward of a model with fp8 weights: SODA beside core's LoRA, both in bypass, and the model alone.

Real ComfyUI classes with random weights, cast to float8_e4m3fn and computed in bf16 as *Load Diffusion Model* does with
weight_dtype fp8_e4m3fn. All sides take turns on one model in one process; the median of their forwards is shown, and
the memory that a side needs beyond the model's.

    PYTHONPATH=path/to/ComfyUI python benchmarks/bypass.py [--model sdxl] [--size 1024] [--batch 2]
    PYTHONPATH=path/to/ComfyUI python benchmarks/bypass.py --small         # a tiny one, on a CPU: whether it runs
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from train_step import GIB, MODELS, load_pack

SMALL = {
    "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "num_head_channels": 32,
}  # fmt: skip
RANK = 32
TURNS = 3


def fp8_patcher(name: str, small: bool):
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    class_name, unet = MODELS[name]
    fp8 = torch.float8_e4m3fn
    config = getattr(comfy.supported_models, class_name)({**unet, **(SMALL if small else {}), "dtype": fp8})
    config.set_inference_dtype(fp8, torch.bfloat16)
    device = comfy.model_management.get_torch_device()
    with torch.inference_mode():
        model = config.get_model({}, "", device=torch.device("cpu"))
        for key, parameter in model.named_parameters():
            matrix = parameter.ndim > 1
            fan_in = parameter.shape[1:].numel() if matrix else 1
            numbers = torch.full(parameter.shape, float(key.endswith("weight")), device=device)
            parameter.data = (numbers.normal_(0, fan_in**-0.5) if matrix else numbers).to(fp8).cpu()
    return comfy.model_patcher.ModelPatcher(model, device, torch.device("cpu"))


def adapter(patcher, decomposition: str):
    from pack.adapter import Adapter, Layer
    from pack.hosts.comfy.base import shapes
    from pack.hosts.comfy.targets import attention_weights
    from pack.kronecker import factor_sizes

    known, layers = shapes(patcher), {}
    for layer, key in attention_weights(patcher).items():
        logs = tuple(torch.randn(n * (n - 1) // 2) * 0.02 for n in factor_sizes(known[key][1], 3))
        delta = None if decomposition == "none" else torch.randn(min(known[key])) * 0.01
        layers[layer] = (Layer(decomposition, delta, logs),)
    return Adapter(layers, {}, decomposition)


def core_lora(patcher):
    """Core's LoRAs on the same layers, through what *Load LoRA (Bypass)* uses."""
    from comfy.weight_adapter import BypassInjectionManager, LoRAAdapter
    from pack.hosts.comfy.base import shapes
    from pack.hosts.comfy.targets import attention_weights

    known, manager = shapes(patcher), BypassInjectionManager()
    for key in attention_weights(patcher).values():
        out, inner = known[key]
        weights = (torch.randn(out, RANK).bfloat16() * 0.01, torch.randn(RANK, inner).bfloat16() * 0.01)
        manager.add_adapter(key, LoRAAdapter(set(), (*weights, float(RANK), None, None, None)), 1.0)
    clone = patcher.clone()
    clone.set_injections("bypass_lora", manager.create_injections(clone.model))
    return clone


def measure(patcher, x: dict, repeats: int) -> tuple[list[float], float]:
    """(seconds of some forwards, GiB allocated while the model is loaded)."""
    import comfy.model_management

    cuda = patcher.load_device.type == "cuda"
    comfy.model_management.load_models_gpu(
        [patcher, *patcher.get_nested_additional_models()], force_full_load=True
    )  # as sampling does
    found = []
    for _ in range(repeats + 2):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            patcher.model.apply_model(**x)
        if cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found[2:], torch.cuda.memory_allocated() / GIB if cuda else 0.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=MODELS, default="sdxl")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=8, help="forwards of a side in each of its turns")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    load_pack()
    if args.small:
        from comfy.cli_args import args as comfy_args

        comfy_args.cpu, args.model, args.size, args.repeats = True, "sd15", 64, 1
    from pack.hosts.comfy.patch import apply

    patcher = fp8_patcher(args.model, args.small)
    device, side = patcher.load_device, args.size // 8
    unet = MODELS[args.model][1]
    x = {"x": torch.randn(args.batch, 4, side, side, device=device), "t": torch.full((args.batch,), 3.0, device=device),
         "c_crossattn": torch.randn(args.batch, 77, unet["context_dim"], device=device)}  # fmt: skip
    if unet["adm_in_channels"]:
        x["y"] = torch.randn(args.batch, unet["adm_in_channels"], device=device)
    sides = {
        "the model alone": patcher,
        f"core LoRA r{RANK}, bypass": core_lora(patcher),
        "SODA rotation only, bypass": apply(patcher, [(adapter(patcher, "none"), 1.0)])[0],
        "SODA lq, bypass": apply(patcher, [(adapter(patcher, "lq"), 1.0)])[0],
        "SODA svd, bypass": apply(patcher, [(adapter(patcher, "svd"), 1.0)])[0],
        "SODA lq, merged": apply(patcher, [(adapter(patcher, "lq"), 1.0)], mode="merge")[0],
    }
    print(
        f"{args.model} {args.size}², batch {args.batch}, fp8_e4m3fn weights, bf16, {device}, torch {torch.__version__}"
    )
    taken: dict[str, list[float]] = {name: [] for name in sides}
    memory: dict[str, float] = {}
    for _ in range(TURNS):
        for name, one in sides.items():
            seconds, held = measure(one, x, args.repeats)
            taken[name] += seconds
            memory.setdefault(name, held)  # later, those of other sides may still be loaded
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    base, core = memory["the model alone"], medians[f"core LoRA r{RANK}, bypass"]
    for name, median in medians.items():
        print(f"{name:28} {1e3 * median:9.1f} ms   {median / core:5.2f} of core's   {memory[name] - base:+.2f} GiB")


if __name__ == "__main__":
    main()
