"""What the reader network sees in the demo's pictures, beside the committed figures of 100 pictures each.

The reader was trained on drawings alone and never saw a sample of the model. The committed figures lie in
playground/results/demo_figures.json: {row: {"subject": share, "style": share}}, rows and concepts as on the sheet;
a share is there only where the row's prompts ask for that concept.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image

from playground.concepts import SUBJECTS
from playground.grammar import STYLES
from playground.reader import load_reader, read

from .errors import RunError
from .sheet import Row

COMMITTED = Path(__file__).resolve().parents[1] / "playground" / "results" / "demo_figures.json"


def table(rows: Sequence[Row], subject: str, style: str) -> str:
    """One line a row: in how many pictures the reader sees the subject and the style, here and in the committed run."""
    if not COMMITTED.is_file():
        raise RunError(f"{COMMITTED} is missing, so there is nothing to compare with: take a complete clone.")
    committed = json.loads(COMMITTED.read_text())
    reader = load_reader()
    lines = [f"{'read back from the pictures':<28}{'subject seen':>24}{'style seen':>24}"]
    for row in rows:
        readings = read(reader, torch.stack([_tensor(encoded) for encoded in row.images]))
        seen = {
            "subject": readings["subject"] == 1 + list(SUBJECTS).index(subject),
            "style": readings["style"] == STYLES.index(style),
        }
        cells = [
            f"{int(hits.sum())} of {len(hits)}"
            + (f" (committed {committed[row.title][name]:.0%})" if name in committed[row.title] else "")
            for name, hits in seen.items()
        ]
        lines.append(f"  {row.title:<26}{cells[0]:>24}{cells[1]:>24}")
    return "\n".join(lines)


def _tensor(encoded: bytes) -> torch.Tensor:
    """An encoded picture as (3, H, W) in [0, 1]."""
    pixels = numpy.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), dtype=numpy.float32)
    return torch.from_numpy(pixels / 255).permute(2, 0, 1)
