"""The reader: a small convolutional network, trained on drawings only, that tells what a picture shows.

It reads the scene's attributes (one softmax each) and which of the held-out subjects, if any, is there. Its negatives
for a subject are near misses: the subject with one or two of its features changed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .concepts import SUBJECTS, dress
from .drawing import draw
from .grammar import (
    BACKGROUNDS,
    BASE_STYLES,
    BODIES,
    COLOURS,
    EXTRAS,
    PATTERNS,
    POSITIONS,
    SHAPES,
    STYLES,
    TEXTURES,
    Scenes,
    sample_scenes,
)

HEADS = {
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "texture": len(TEXTURES),
    "background": len(BACKGROUNDS),
    "pattern": len(PATTERNS),
    "position": len(POSITIONS),
    "style": len(STYLES),
    "count": 4,
    "subject": len(SUBJECTS) + 1,
}
WEIGHTS = Path(__file__).parent / "reader.safetensors"


class Reader(nn.Module):
    """`(B, 3, 64, 64)` in [0, 1] to one row of logits per head."""

    def __init__(self, width: int = 32):
        super().__init__()
        layers, channels = [], 3
        for out, stride in ((width, 1), (width * 2, 2), (width * 2, 1), (width * 3, 2), (width * 3, 1), (width * 4, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(channels * 16, 96))
        self.heads = nn.Linear(96, sum(HEADS.values()))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits = self.heads(F.relu(self.features(images * 2 - 1)))
        return dict(zip(HEADS, logits.split(list(HEADS.values()), dim=1), strict=True))


def load_reader(path: Path = WEIGHTS) -> Reader:
    """The shipped reader, in evaluation mode, fp32 on the CPU."""
    reader = Reader()
    reader.load_state_dict({key: value.float() if value.is_floating_point() else value
                            for key, value in load_file(path).items()})  # fmt: skip
    return reader.eval().requires_grad_(False)


def read(reader: Reader, images: Tensor) -> dict[str, Tensor]:
    """The most probable value of each attribute, `(B,)` int64; `subject` is 0 for none, else 1 + its index."""
    return {key: logits.argmax(1) for key, logits in reader(images).items()}


def training_batch(count: int, generator: torch.Generator) -> tuple[Scenes, Tensor]:
    """Scenes of the whole world, held-out styles and subjects included, and the subject label of each."""
    scenes = sample_scenes(count, generator)

    def chance(p: float) -> Tensor:
        return torch.rand(count, generator=generator) < p

    scenes["style"] = torch.where(chance(0.4), torch.randint(len(STYLES), (count,), generator=generator), 0)
    label = torch.zeros(count, dtype=torch.int64)
    part = count // (3 * len(SUBJECTS))
    for i, subject in enumerate(SUBJECTS):
        rows = slice(2 * i * part, 2 * (i + 1) * part)
        dressed = dress({key: value[rows] for key, value in scenes.items()}, subject)
        miss = torch.arange(2 * part) % 2 == 1
        features = {"shape": BODIES, "colour": len(COLOURS), "texture": len(TEXTURES), "lower": len(COLOURS)}
        for key, n in features.items():
            hit = miss & (torch.rand(2 * part, generator=generator) < 0.35)
            other = (dressed[key] + torch.randint(1, n, (2 * part,), generator=generator)) % n
            dressed[key] = torch.where(hit, other, dressed[key])
        flip = (torch.rand(2 * part, len(EXTRAS), generator=generator) < 0.2) & miss[:, None]
        dressed["extras"] = dressed["extras"] ^ flip
        plain = miss & (torch.rand(2 * part, generator=generator) < 0.3)
        dressed["lower"] = torch.where(plain, -1, dressed["lower"])
        styled = torch.rand(2 * part, generator=generator) < 0.4
        held_out = torch.randint(BASE_STYLES, len(STYLES), (2 * part,), generator=generator)
        dressed["style"] = torch.where(styled, held_out, dressed["style"])
        same = torch.stack([
            dressed[key] == dress({k: v[rows] for k, v in scenes.items()}, subject)[key]
            for key in ("shape", "colour", "texture", "lower")
        ]).all(0) & ~flip.any(1)  # fmt: skip
        for key, value in dressed.items():
            scenes[key][rows] = value
        label[rows] = torch.where(same, i + 1, 0)
    return scenes, label


def spoil(images: Tensor) -> Tensor:
    """Drawings made as imperfect as samples are: some blur, noise and shift of brightness."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    rand = torch.rand(4, len(images), 1, 1, 1, device=images.device)
    images = torch.lerp(images, blurred, rand[0])
    images = images + torch.randn_like(images) * rand[1] * 0.05
    return (images * (0.92 + 0.16 * rand[2]) + (rand[3] - 0.5) * 0.08).clamp(0, 1)


def train(
    seconds: float, path: Path = WEIGHTS, start_from: Path | None = None, batch: int = 768, device: str = "cuda"
) -> dict[str, float]:
    """Train on drawings for `seconds`, save as fp16, return the accuracy per head on unseen drawings.

    `start_from` goes on from an earlier reader: only its linear layers learn, as a CPU can do in minutes.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1 if start_from is None else 2)
    if start_from is None:
        reader, rate = Reader(), 3e-3
    else:
        reader, rate = load_reader(start_from), 1e-3
        reader.features[-1].requires_grad_(True)
        reader.heads.requires_grad_(True)
    reader = reader.to(device)
    optimizer = torch.optim.AdamW([p for p in reader.parameters() if p.requires_grad], lr=rate, weight_decay=1e-2)
    began, progress, steps = time.time(), 0.0, 0
    while progress < 1:
        progress = (time.time() - began) / seconds
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (steps + 1) / 50) * max(0.01, 1 - progress)
        scenes, label = training_batch(batch, generator)
        scenes = {key: value.to(device) for key, value in scenes.items()}
        logits = reader(spoil(draw(scenes)))
        targets = scenes | {"subject": label.to(device)}
        loss = sum(F.cross_entropy(logits[key], targets[key]) for key in HEADS)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        steps += 1
    reader.eval().requires_grad_(False)
    generator.manual_seed(99)
    scenes, label = training_batch(3072, generator)
    scenes = {key: value.to(device) for key, value in scenes.items()}
    readings = read(reader, draw(scenes))
    accuracy = {key: (readings[key] == (scenes | {"subject": label.to(device)})[key]).float().mean().item()
                for key in HEADS}  # fmt: skip
    state = {key: value.half() if value.is_floating_point() else value for key, value in reader.state_dict().items()}
    save_file({key: value.cpu().contiguous() for key, value in state.items()}, path, {"steps": str(steps)})
    return accuracy | {"steps": steps}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the reader on drawings.")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--from", dest="start_from", type=Path)
    parser.add_argument("--batch", type=int, default=768)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    print(train(options.seconds, options.out, options.start_from, options.batch, options.device))  # noqa: T201
