"""The contact sheet: one labelled row of images per model, the same seeds in every column."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, LABEL, HEADER = 192, 12, 300, 40
PAPER, INK, FAINT = (250, 249, 246), (25, 30, 35), (110, 116, 122)


@dataclass(frozen=True)
class Row:
    """`title` is the row's name, `caption` the prompt below it, `images` the encoded pictures from left to right."""

    title: str
    caption: str
    images: Sequence[bytes]


def write_sheet(rows: Sequence[Row], headers: Sequence[str], path: Path) -> None:
    """A PNG with all rows; small pictures are enlarged without smoothing."""
    columns = max(len(row.images) for row in rows)
    size = (LABEL + columns * (SIDE + GAP) + GAP, HEADER + len(rows) * (SIDE + GAP) + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(22), ImageFont.load_default(14)
    for column, text in enumerate(headers):
        draw.text((LABEL + column * (SIDE + GAP) + SIDE // 2, HEADER // 2), text, FAINT, small, anchor="mm")
    for line, row in enumerate(rows):
        top = HEADER + line * (SIDE + GAP)
        draw.text((GAP, top + 40), row.title, INK, large)
        draw.multiline_text((GAP, top + 76), wrap(row.caption, small, LABEL - 2 * GAP), FAINT, small, spacing=5)
        for column, encoded in enumerate(row.images):
            picture = Image.open(io.BytesIO(encoded)).convert("RGB")
            picture.thumbnail((SIDE, SIDE))
            scale = SIDE // max(picture.size)
            picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
            sheet.paste(picture, (LABEL + column * (SIDE + GAP), top))
    sheet.save(path, "PNG")


def wrap(text: str, font, width: int) -> str:
    """Breaks between words so that no line is wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
