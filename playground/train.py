"""Train the playground model from scratch on drawings.

Needs a GPU and ComfyUI's own model classes on the Python path (they are what is trained):

    PYTHONPATH=path/to/ComfyUI torchrun --nproc_per_node=1 -m playground.train --seconds 520 --out playground

Flow matching (architecture.py), AdamW, warm-up and cosine by wall clock, an exponential moving average of the weights
as the result. With several GPUs the gradients are averaged. Writes the model (fp16), the loss curve and the log.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .architecture import TEXT, UNET
from .drawing import draw
from .forward import Walk
from .grammar import caption, sample_scenes
from .model import Playground, checkpoint, sample, tokens
from .reader import load_reader, read


class Pages(IterableDataset):
    """Endless batches of scenes and their captions' tokens; one caption in ten is empty, for guidance."""

    def __init__(self, batch: int, seed: int):
        self.batch, self.seed = batch, seed

    def __iter__(self):
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(self.seed * 1000 + get_worker_info().id)
        while True:
            scenes = sample_scenes(self.batch, generator)
            empty = torch.rand(self.batch, generator=generator) < 0.1
            rows = [tokens("" if empty[i] else caption(scenes, i, generator)) for i in range(self.batch)]
            yield scenes, torch.tensor(rows)


def train(options: argparse.Namespace) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(options.device, rank) if options.device == "cuda" else torch.device("cpu")
    if world > 1:
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    model = Playground().to(device, memory_format=torch.channels_last)
    if options.resume:
        model.load_state_dict(torch.load(options.resume, map_location=device, weights_only=True))
    parameters = [p for p in model.parameters() if p.requires_grad or p.is_floating_point()]
    for p in parameters:
        p.requires_grad_(True)
    average = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    torch.manual_seed(100 + rank)
    loader = iter(DataLoader(Pages(options.batch, 1 + rank + options.seed), batch_size=None,
                             num_workers=options.workers, pin_memory=device.type == "cuda",
                             prefetch_factor=4))  # fmt: skip

    def loss_of(images: Tensor, rows: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        x = torch.lerp(images, noise, t.view(-1, 1, 1, 1))
        with torch.autocast(device.type, torch.bfloat16):
            predicted = model(x, t, model.encode(rows))
        return F.mse_loss(predicted.float(), noise - images)

    if options.compile:
        torch._dynamo.config.recompile_limit = 64
        model.walk = Walk(model.unet, compiled=True)
    options.out.mkdir(parents=True, exist_ok=True)
    log = (options.out / "log.txt").open("w") if rank == 0 else None
    losses, running, steps, start, progress = [], None, 0, time.time(), 0.0
    while progress < 1:
        scenes, rows = next(loader)
        scenes = {key: value.to(device, non_blocking=True) for key, value in scenes.items()}
        rows = rows.to(device, non_blocking=True)
        images = (draw(scenes) * 2 - 1).contiguous(memory_format=torch.channels_last)
        noise = torch.randn_like(images)
        uniform, normal = torch.rand(len(images), device=device), torch.randn(len(images), device=device).sigmoid()
        t = torch.where(torch.rand(len(images), device=device) < 0.5, uniform, normal)
        loss = loss_of(images, rows, noise, t)
        loss.backward()
        if steps == 0:
            parameters = [p for p in parameters if p.grad is not None]
        elapsed = torch.tensor([(time.time() - start) / options.seconds if rank == 0 else 0.0], device=device)
        flat = torch.cat([p.grad.flatten() for p in parameters] + [loss.detach().view(1) / world, elapsed])
        if world > 1:
            dist.all_reduce(flat)
        shared, mean_loss, progress = flat[:-2] / world, flat[-2], flat[-1].item()
        shared = shared / (shared.norm() / 1.0).clamp(min=1)
        for p, gradient in zip(parameters, shared.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(gradient.view_as(p))
        warm = min(1.0, (steps + 1) / 500)
        for group in optimizer.param_groups:
            group["lr"] = options.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, progress))))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        if steps == 3:
            start = time.time()  # what came before was compilation
        decay = min(0.9995, (1 + steps) / (20 + steps))
        torch._foreach_lerp_(list(average.values()), list(model.parameters()), 1 - decay)
        running = mean_loss if running is None else torch.lerp(running, mean_loss, 0.02)
        if rank == 0 and steps % 50 == 0:
            losses.append((steps, running.item()))
            seen = steps * options.batch * world
            line = f"step {steps} loss {running.item():.5f} seen {seen} at {time.time() - start:.0f} s"
            log.write(line + "\n")
            log.flush()
            if steps % 500 == 0 or steps in (50, 100):
                print(line, flush=True)  # noqa: T201
    if rank == 0:
        model.load_state_dict(model.state_dict() | average)
        model.walk = Walk(model.unet)
        torch.save(model.state_dict(), options.out / "resume.pt")
        architecture = json.dumps({"unet": UNET, "text": TEXT})
        save_file(checkpoint(average), options.out / "model.safetensors",
                  {"modelspec.title": "SODA playground", "soda.playground": architecture})  # fmt: skip
        plot(losses, options.out / "loss.png")
        finish(model, options.out, options.samples)
    if world > 1:
        dist.destroy_process_group()


def plot(losses: list[tuple[int, float]], path: Path) -> None:
    """The loss over the steps, logarithmic, as a PNG."""
    width, height, margin = 720, 360, 48
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    low, high = (math.log10(limit(loss for _, loss in losses)) for limit in (min, max))

    def place(step: float, loss: float) -> tuple[float, float]:
        x = margin + (width - 2 * margin) * step / losses[-1][0]
        return x, margin + (height - 2 * margin) * (high - math.log10(loss)) / (high - low)

    for loss in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        if low <= math.log10(loss) <= high:
            y = place(0, loss)[1]
            pen.line([(margin, y), (width - margin, y)], fill="#dddddd")
            pen.text((8, y - 6), f"{loss:g}", fill="black")
    pen.line([place(*point) for point in losses], fill="#2040c0", width=2)
    pen.text((margin, 12), "velocity error, running mean", fill="black")
    pen.text((width - 150, height - 24), f"{losses[-1][0]} steps", fill="black")
    picture.save(path)


@torch.no_grad()
def finish(model: Playground, out: Path, count: int) -> None:
    """The sample sheet with its prompts, and how well the reader reads the asked attributes back."""
    generator = torch.Generator().manual_seed(4242)
    scenes = sample_scenes(count, generator)
    texts = [caption(scenes, i) for i in range(count)]
    with torch.autocast(model.words.weight.device.type, torch.bfloat16):
        images = torch.cat([sample(model, texts[i : i + 256], seed=i) for i in range(0, count, 256)])
    rows = min(8, count // 8)
    grid = images[: rows * 8].view(rows, 8, 3, 64, 64).permute(0, 3, 1, 4, 2).reshape(rows * 64, 512, 3)
    picture = Image.fromarray((grid * 255).byte().cpu().numpy())
    picture.resize((1024, rows * 128), 0).save(out / "samples.png")
    (out / "samples.txt").write_text("\n".join(texts[:64]))
    readings = read(load_reader(), images.float().cpu())
    attributes = ("shape", "colour", "background", "texture", "pattern", "position", "style", "count")
    score = {key: round((readings[key] == scenes[key]).float().mean().item(), 3) for key in attributes}
    print("read back:", score, flush=True)  # noqa: T201
    (out / "base_metrics.json").write_text(json.dumps(score))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the playground model on drawings.")
    parser.add_argument("--out", type=Path, default=Path("playground"))
    parser.add_argument("--seconds", type=float, default=520)
    parser.add_argument("--batch", type=int, default=384, help="per GPU")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=12, help="per GPU")
    parser.add_argument("--samples", type=int, default=512, help="drawn at the end and read back")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--compile", action="store_true")
    train(parser.parse_args())
