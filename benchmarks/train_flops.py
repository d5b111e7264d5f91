"""The arithmetic that SODA adds to a training step of a real-size ComfyUI model, counted: it holds on every device.

Products, convolutions and attention are counted by torch on a model without numbers (no GPU, no memory), element-wise
work is not. The frozen model's forward and backward to its input is the measure; to it come the gradients of the
adapted weights, and making these weights forward and backward, counted on one weight of each shape.

    PYTHONPATH=path/to/ComfyUI python benchmarks/train_flops.py [--model sdxl] [--size 1024] [--batch 1]
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from torch.utils.flop_counter import FlopCounterMode
from train_step import MODELS, load_pack

META = torch.device("meta")
BARS = {"lq": 0.30, "svd": 0.60}


def model(name: str):
    import comfy.model_patcher
    import comfy.supported_models

    kind, unet = MODELS[name]
    config = getattr(comfy.supported_models, kind)(dict(unet, dtype=torch.bfloat16))
    config.set_inference_dtype(torch.bfloat16, None)
    made = config.get_model({}, "", device=META).to(META)
    made.requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(made, load_device=META, offload_device=META)


def step(patcher, name: str, size: int, batch: int) -> int:
    """Operations of a forward and backward pass to the input and whatever weight wants a gradient."""
    from comfy.ldm.modules.attention import attention_pytorch

    unet = MODELS[name][1]
    options = {"transformer_options": {"optimized_attention_override": lambda _, *a, **k: attention_pytorch(*a, **k)}}
    x = torch.empty(batch, 4, size // 8, size // 8, device=META, dtype=torch.bfloat16, requires_grad=True)
    context = torch.empty(batch, 77, unet["context_dim"], device=META, dtype=torch.bfloat16)
    y = unet["adm_in_channels"] and torch.empty(batch, unet["adm_in_channels"], device=META, dtype=torch.bfloat16)
    network = patcher.model.diffusion_model
    with FlopCounterMode(display=False) as counter:
        network(x, torch.empty(batch, device=META), context=context, y=y, **options).sum().backward()
    return counter.get_total_flops()


def making(shapes: Counter, decomposition: str) -> tuple[int, int]:
    """(forward, backward) operations of all adapted weights."""
    from pack.training.parameters import SodaParameters

    generator = torch.Generator().manual_seed(0)
    totals = [0, 0]
    for shape, count in shapes.items():
        parameters = SodaParameters({"w": torch.randn(shape, generator=generator)}, decomposition)
        with FlopCounterMode(display=False) as forward:
            weight = parameters()["w"]
        with FlopCounterMode(display=False) as backward:
            weight.sum().backward()
        totals[0] += count * forward.get_total_flops()
        totals[1] += count * backward.get_total_flops()
    return totals[0], totals[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sdxl")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    load_pack()
    from comfy.utils import get_attr
    from pack.hosts.comfy.base import layer_shape
    from pack.hosts.comfy.targets import attention_weights

    patcher = model(arguments.model)
    case = (patcher, arguments.model, arguments.size, arguments.batch)
    frozen = step(*case)
    layers = attention_weights(patcher)
    for layer in layers:
        get_attr(patcher.model, layer).weight.requires_grad_()
    gradients = step(*case) - frozen
    shapes = Counter(layer_shape(patcher, layer) for layer in layers)
    print(f"{arguments.model}, {arguments.size} px, batch {arguments.batch}: {len(layers)} weights, 1e12 operations")
    print(f"{'frozen forward + backward':34}{frozen / 1e12:8.2f}")
    print(f"{'gradients of the adapted weights':34}{gradients / 1e12:8.2f}{gradients / frozen:8.1%}")
    for decomposition, bar in BARS.items():
        forward, backward = making(shapes, decomposition)
        whole = gradients + forward + backward
        print(
            f"{decomposition + ': made, their backward':34}{forward / 1e12:8.2f} {backward / 1e12:.2f}"
            f"   together with the gradients {whole / frozen:.1%} (bar {bar:.0%})"
        )


if __name__ == "__main__":
    main()
