"""The samples of a training side by side, each labelled with its step."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

MOST = 64  # samples; of more, every second is left out
COLUMNS = 8
LEAST, LARGEST = 192, 512  # pixels of a sample's longer side
GAP, LABEL = 8, 28
PAPER, INK = (24, 24, 27), (228, 228, 231)


class Strip:
    def __init__(self) -> None:
        self.samples: list[tuple[int, Image.Image]] = []

    def add(self, step: int, image: Image.Image) -> None:
        """A sample made after `step` steps."""
        if len(self.samples) == MOST:
            self.samples = self.samples[1::2]
        self.samples.append((step, _sized(image)))

    def draw(self) -> Image.Image:
        """In rows of COLUMNS. There must be a sample."""
        width, height = (max(sizes) for sizes in zip(*(image.size for _, image in self.samples), strict=True))
        columns, rows = min(len(self.samples), COLUMNS), -(-len(self.samples) // COLUMNS)
        sheet = Image.new("RGB", (GAP + columns * (width + GAP), rows * (height + LABEL) + GAP), PAPER)
        canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
        for number, (step, image) in enumerate(self.samples):
            row, column = divmod(number, COLUMNS)
            left, top = GAP + column * (width + GAP), row * (height + LABEL)
            canvas.text((left + width // 2, top + LABEL // 2), f"step {step}", INK, font, anchor="mm")
            sheet.paste(image, (left, top + LABEL))
        return sheet

    def tensor(self) -> torch.Tensor:
        """`draw` as a ComfyUI IMAGE, (1, H, W, 3) in 0 to 1."""
        return torch.from_numpy(np.asarray(self.draw(), dtype=np.float32) / 255)[None]


def _sized(image: Image.Image) -> Image.Image:
    """Large ones smaller; small ones, such as the playground's, larger by a whole factor and without smoothing."""
    longest = max(image.size)
    if longest < LEAST:
        factor = LEAST // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    sized = image.copy()
    sized.thumbnail((LARGEST, LARGEST))
    return sized
