"""A picture of an adapter: rotation angle and spectrum change of every layer, one bar each.

Block after block of the model; within a block first self-attention, then cross-attention, each with q, k, v and out
of all its transformers side by side.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from .adapter import Adapter
from .atomic import replace_file
from .errors import SodaError, SodaFileError
from .summary import LayerSummary, summarise

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

WIDTH, PANEL, LEFT, RIGHT, TOP, GAP, BOTTOM = 1680, 290, 80, 20, 96, 60, 40
INK, FAINT, GRID, SHADE = "#222222", "#666666", "#d8d8d8", "#f3f3f6"
COLOURS = {"q": "#3366cc", "k": "#dc7000", "v": "#109618", "out": "#a0289b", "other": "#666666"}
PALE = {"q": "#c2d1f0", "k": "#f4d4b2", "v": "#b7dfb9", "out": "#e2bee1", "other": "#d0d0d0"}


def draw(adapter: Adapter, path: str | os.PathLike) -> None:
    """Write the picture as a PNG. Raises SodaError if Pillow is missing, SodaFileError where it cannot be."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise SodaFileError(f"{path}: the picture is a PNG; give a name that ends in .png")
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise SodaError("drawing needs Pillow, which is not installed; run `pip install pillow`") from None
    layers = _grouped(summarise(adapter))
    below = TOP + PANEL + GAP
    image = Image.new("RGB", (WIDTH, below + PANEL + BOTTOM), "white")
    canvas = ImageDraw.Draw(image)
    canvas.text((LEFT, 12), f"{adapter.name[:60] or 'adapter'} ({len(adapter.layers)})", INK, font_size=20)
    canvas.text((LEFT, 40), "One bar per layer; in each block first self-attention, then cross-attention", FAINT,
                font_size=14)  # fmt: skip
    _legend(canvas, {_kind(layer.name) for layer in layers})
    angles = [(layer.angle_rms, layer.angle_largest) for layer in layers]
    _panel(canvas, TOP, layers, angles, "Rotation in degrees: root mean square of the angles; pale, the largest")
    spectra = [(layer.spectrum_rms or 0.0, 0.0) for layer in layers]
    _panel(canvas, below, layers, spectra, "Spectrum: root mean square of its change, in units of the weights")
    replace_file(path, lambda file: image.save(file, "PNG"))


def _panel(
    canvas: ImageDraw, top: int, layers: Sequence[LayerSummary], values: Sequence[tuple[float, float]], title: str
) -> None:
    """Bars of (solid, pale) values over a grid, in shaded blocks with their names below."""
    bottom, right = top + PANEL, WIDTH - RIGHT
    edges = [LEFT + (right - LEFT) * i / len(layers) for i in range(len(layers) + 1)]
    start = 0
    for number, (block, members) in enumerate(groupby(layers, key=lambda layer: _block(layer.name))):
        end = start + len(list(members))
        if number % 2:
            canvas.rectangle((edges[start], top, edges[end], bottom), SHADE)
        for label in (block, block.split()[-1]):
            if edges[end] - edges[start] > canvas.textlength(label, font_size=14) + 6:
                canvas.text(((edges[start] + edges[end]) / 2, bottom + 6), label, INK, font_size=14, anchor="mt")
                break
        start = end
    step = _step(max(max(pair) for pair in values))
    ceiling = step * max(1, math.ceil(max(max(pair) for pair in values) / step))
    for i in range(round(ceiling / step) + 1):
        y = bottom - PANEL * i * step / ceiling
        canvas.line((LEFT, y, right, y), GRID)
        canvas.text((LEFT - 8, y), f"{i * step:g}", FAINT, font_size=14, anchor="rm")
    gap = 1 if edges[1] - edges[0] >= 4 else 0
    for i, (layer, (solid, pale)) in enumerate(zip(layers, values, strict=True)):
        for value, colours in ((pale, PALE), (solid, COLOURS)):
            if value > 0:
                y, end_of_bar = bottom - max(1.0, PANEL * value / ceiling), edges[i + 1] - 1 - gap
                canvas.rectangle((edges[i], y, max(edges[i], end_of_bar), bottom), colours[_kind(layer.name)])
    canvas.line((LEFT, bottom, right, bottom), FAINT)
    canvas.text((LEFT, top - 22), title, INK, font_size=15)


def _legend(canvas: ImageDraw, kinds: set[str]) -> None:
    x = WIDTH - RIGHT
    for kind in reversed([kind for kind in COLOURS if kind in kinds]):
        x -= int(canvas.textlength(kind, font_size=15))
        canvas.text((x, 16), kind, INK, font_size=15)
        canvas.rectangle((x - 20, 18, x - 7, 31), COLOURS[kind])
        x -= 44


def _step(largest: float) -> float:
    """1, 2 or 5 times a power of ten that cuts 0 to `largest` into 3 to 6 pieces."""
    if largest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest / 3))
    return next(share * power for share in (1, 2, 5, 10) if largest / (share * power) <= 6)


def _grouped(layers: Sequence[LayerSummary]) -> list[LayerSummary]:
    """The layers of a block, attention and kind side by side; blocks stay in their order."""
    blocks = list(dict.fromkeys(_block(layer.name) for layer in layers))
    kinds = list(COLOURS)

    def place(layer: LayerSummary) -> tuple[int, bool, int]:
        return blocks.index(_block(layer.name)), ".attn2." in layer.name, kinds.index(_kind(layer.name))

    return sorted(layers, key=place)


def _kind(name: str) -> str:
    match = re.search(r"(?:to_(q|k|v|out)\b|\b(q|k|v|out)_proj)", name)
    return (match[1] or match[2]) if match else "other"


def _block(name: str) -> str:
    """The part of the model that a layer stands in, in a word and its number."""
    match = re.search(r"(input|output|middle|down|mid|up)_blocks?\.(\d+)(?:\.attentions\.(\d+))?", name)
    if match is None:
        return name.split(".")[0]
    side, number, attention = match.groups()
    if side in ("middle", "mid"):
        return side
    return f"{side} {number}" if attention is None else f"{side} {number}.{attention}"
