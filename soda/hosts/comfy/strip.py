"""The samples of a training side by side, each labelled with its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ...atomic import replace_file

MOST = 64  # samples; of more, every second is left out
COLUMNS = 8
LEAST, LARGEST = 192, 512  # pixels of a sample's longer side
GAP, LABEL = 8, 28
PAPER, INK = (24, 24, 27), (228, 228, 231)


class Strip:
    def __init__(self) -> None:
        self.samples: list[tuple[int, Image.Image]] = []

    def add(self, step: int, image: Image.Image) -> None:
        """A sample made after `step` steps; a training that went back makes those after it anew."""
        self.samples = [sample for sample in self.samples if sample[0] < step]
        if len(self.samples) == MOST:
            self.samples = self.samples[1::2]
        self.samples.append((step, _sized(image)))

    def state(self) -> list[list[Any]]:
        """The samples for a checkpoint: [step, pixels (H, W, 3) in uint8], at most 0.8 MB each."""
        return [[step, torch.from_numpy(np.array(image))] for step, image in self.samples]

    def load_state(self, state: Sequence[Sequence[Any]]) -> None:
        self.samples = [(step, Image.fromarray(pixels.numpy())) for step, pixels in state]

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

    def save(self, texts: Mapping[str, str]) -> tuple[str, str]:
        """`draw` as a new PNG in the output folder, with `texts` in it -> (its subfolder, its name).

        Raises OSError or SodaFileError where it cannot be written, and then leaves nothing.
        """
        output = folder_paths.get_output_directory()
        folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path("soda/training", output)
        name, info = f"{stem}_{counter:05}_.png", PngInfo()
        for key, text in texts.items():
            info.add_text(key, text)
        replace_file(Path(folder, name), lambda file: self.draw().save(file, "PNG", pnginfo=info))
        return subfolder, name


def _sized(image: Image.Image) -> Image.Image:
    """Large ones smaller; small ones, such as the playground's, larger by a whole factor and without smoothing."""
    longest = max(image.size)
    if longest < LEAST:
        factor = LEAST // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    sized = image.copy()
    sized.thumbnail((LARGEST, LARGEST))
    return sized
