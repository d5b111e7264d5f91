"""Scenes to pictures: signed distance fields on the pixel grid, batched, on any device.

A picture is `(B, 3, 64, 64)` float32 in [0, 1]. Lengths are half picture widths (32 px), y points down. An object is
drawn in its own frame `u = R(-angle) (p - centre) / scale`, where its body fits the unit disc; the coverage of a pixel
by a field d is `clamp(0.5 - d / pixel, 0, 1)`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .grammar import SCALES, STYLES, Scenes

SIZE = 64
PIXEL = 2 / SIZE
INKS = {
    "red": (0.86, 0.12, 0.14), "orange": (0.97, 0.55, 0.08), "yellow": (0.98, 0.88, 0.12), "green": (0.13, 0.62, 0.2),
    "cyan": (0.1, 0.8, 0.85), "blue": (0.13, 0.3, 0.88), "purple": (0.52, 0.16, 0.72), "pink": (0.98, 0.5, 0.72),
    "white": (1.0, 1.0, 1.0), "black": (0.04, 0.04, 0.05), "gray": (0.52, 0.52, 0.54), "beige": (0.93, 0.85, 0.7),
    "brown": (0.42, 0.26, 0.14), "navy": (0.06, 0.09, 0.32), "lavender": (0.8, 0.74, 0.96), "mint": (0.7, 0.93, 0.8),
}  # fmt: skip
OBJECT_INKS = torch.tensor([INKS[c] for c in ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")])
GROUND_INKS = torch.tensor([INKS[c] for c in ("white", "black", "gray", "beige", "brown", "navy", "lavender", "mint")])


def _bodies(x: Tensor, y: Tensor) -> Tensor:
    """Signed distances of the ten shapes at `(x, y)`, stacked in the order of `grammar.SHAPES`."""
    ax, ay, r = x.abs(), y.abs(), torch.hypot(x, y)
    sector = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2
    outer, inner = 0.98, 0.42
    nx, ny = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
    ex, ey = nx - outer, ny
    px, py = r * angle.cos(), r * angle.sin().abs()
    star = ((px - outer) * ey - py * ex) / math.hypot(ex, ey)
    heart = torch.minimum((ax + (y - 0.02).abs() - 0.72) * 0.7071, torch.hypot(ax - 0.36, y + 0.34) - 0.509)
    return torch.stack([
        r - 0.85,
        torch.maximum(ax, ay) - 0.74,
        torch.maximum(y - 0.65, 0.867 * ax - 0.498 * (y + 0.95)),
        star,
        heart,
        (ax + ay - 0.98) * 0.7071,
        torch.maximum(ax * 0.866 + ay * 0.5, ay) - 0.8,
        torch.maximum(torch.minimum(ax, ay) - 0.3, torch.maximum(ax, ay) - 0.86),
        (r - 0.6).abs() - 0.24,
        torch.maximum(r - 0.85, 0.7 - torch.hypot(x - 0.42, y + 0.08)),
    ])  # fmt: skip


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


class _Canvas:
    """A batch of pictures under paint: `image` (B, 3, H, W)."""

    def __init__(self, image: Tensor):
        self.image = image

    def paint(self, distance: Tensor, ink: Tensor, scale: Tensor, where: Tensor | None = None) -> None:
        """Cover with `ink` (B, 3, 1, 1) or (B, 3, H, W) where `distance` (B, H, W), in object units, is below 0."""
        cover = (0.5 - distance * scale / PIXEL).clamp(0, 1)
        if where is not None:
            cover = cover * where[:, None, None]
        self.image = torch.lerp(self.image, ink, cover[:, None])


def _ink(values: tuple[float, float, float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(1, 3, 1, 1)


def _ground(scenes: Scenes, x: Tensor, y: Tensor) -> Tensor:
    ink = GROUND_INKS.to(x.device)[scenes["background"]][:, :, None, None]
    other = torch.where(ink.mean(1, keepdim=True) > 0.55, ink * 0.8, ink * 0.72 + 0.2)
    phase = scenes["jitter"][:, 3].view(-1, 1, 1) * math.pi
    striped = (0.5 + torch.sin((x + y) * 10 + phase) * 1.6).clamp(0, 1)
    dotted = (0.9 + (torch.cos(x * 14 + phase) + torch.cos(y * 14 + phase) - 1.2) * 3).clamp(0, 1)
    gradient = ((y + 1) / 2).expand_as(striped)
    share = torch.stack([torch.zeros_like(striped), striped, dotted, gradient])
    share = share[scenes["pattern"], torch.arange(len(ink), device=x.device)]
    return torch.lerp(ink, other, share[:, None])


def _placements(scenes: Scenes) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each of up to three copies: centre x, centre y, scale and whether it is there, each `(B,)`."""
    jitter, number, position = scenes["jitter"], scenes["count"], scenes["position"]
    scale = torch.tensor(SCALES, device=jitter.device)[scenes["size"]] * torch.where(number > 1, 0.62, 1.0)
    shift = (0.92 - scale).clamp(max=0.42)
    x = torch.where(position == 1, -shift, torch.where(position == 2, shift, 0.0)) + jitter[:, 0] * 0.08
    y = torch.where(position == 3, -shift, torch.where(position == 4, shift, 0.0)) + jitter[:, 1] * 0.08
    copies = []
    for i in range(3):
        offset = torch.where(number == 2, (i - 0.5) * 0.9, torch.where(number == 3, (i - 1) * 0.64, 0.0))
        copies.append((x + offset, y, scale, i < number))
    return copies


def _extras(canvas: _Canvas, scenes: Scenes, x: Tensor, y: Tensor, scale: Tensor, behind: bool) -> None:
    """What a monster wears; wings, legs, horns and antennae are behind the body, the hat is before it."""
    has = scenes["extras"].unbind(1)
    ax, image = x.abs(), canvas.image
    dark, bone, pale = _ink((0.15, 0.12, 0.14), image), _ink((0.97, 0.93, 0.78), image), _ink((0.86, 0.94, 1.0), image)
    gold = _ink((1.0, 0.8, 0.15), image)
    if not behind:
        canvas.paint(_box(x, y + 0.78, 0.58, 0.09), dark, scale, has[1])
        canvas.paint(_box(x, y + 1.05, 0.34, 0.27), dark, scale, has[1])
        return
    wing = torch.hypot((ax - 0.98) / 0.42, (y + 0.12 + (ax - 0.98) * 0.5) / 0.3) - 1
    canvas.paint(wing * 0.3 - 0.04, dark, scale, has[3])
    canvas.paint(wing * 0.3, pale, scale, has[3])
    canvas.paint(_box(ax - 0.3, y - 0.85, 0.11, 0.32), dark, scale, has[2])
    horn = torch.maximum((ax - 0.52).abs() * 0.9 + (y + 1.12) * -0.3 - 0.17, _box(ax - 0.52, y + 0.78, 0.3, 0.42))
    canvas.paint(horn, bone, scale, has[0])
    stalk = torch.maximum((ax - 0.2 + (y + 0.6) * 0.35).abs() - 0.06, _box(x, y + 0.85, 0.6, 0.4))
    canvas.paint(stalk, dark, scale, has[4])
    canvas.paint(torch.hypot(ax - 0.43, y + 1.25) - 0.16, gold, scale, has[4])


def _face(canvas: _Canvas, scenes: Scenes, x: Tensor, y: Tensor, scale: Tensor) -> None:
    there, image = scenes["monster"], canvas.image
    white, dark = _ink((1, 1, 1), image), _ink((0.08, 0.06, 0.08), image)
    canvas.paint(torch.hypot(x.abs() - 0.25, y + 0.18) - 0.2, white, scale, there)
    canvas.paint(torch.hypot(x.abs() - 0.22, y + 0.16) - 0.1, dark, scale, there)
    mouth = torch.maximum((torch.hypot(x, y - 0.02) - 0.27).abs() - 0.055, 0.14 - y)
    canvas.paint(mouth, dark, scale, there)


def _border(canvas: _Canvas, scenes: Scenes, body: Tensor, scale: Tensor, there: Tensor) -> None:
    """The line around a body that some styles draw, from the outermost ink inwards; widths in picture units."""
    black, white, gold = (0.03, 0.03, 0.04), (1.0, 1.0, 1.0), (1.0, 0.78, 0.12)
    borders = {
        "outline": [(0.075, black)],
        "sticker": [(0.12, white)],
        "gilded": [(0.14, black), (0.1, gold)],
        "mosaic": [(0.075, black)],
        "comic": [(0.075, black)],
    }
    for name, lines in borders.items():
        for width, ink in lines:
            where = there & (scenes["style"] == STYLES.index(name))
            canvas.paint(body - width / scale, _ink(ink, canvas.image), scale, where)


def draw(scenes: Scenes) -> Tensor:
    """Pictures of `scenes` (whose tensors lie on one device): `(B, 3, 64, 64)` float32 in [0, 1]."""
    device = scenes["shape"].device
    axis = (torch.arange(SIZE, device=device) + 0.5) * PIXEL - 1
    py, px = torch.meshgrid(axis, axis, indexing="ij")
    batch = torch.arange(len(scenes["shape"]), device=device)
    ground = _ground(scenes, px[None], py[None])
    canvas = _Canvas(ground)
    ink = OBJECT_INKS.to(device)[scenes["colour"]][:, :, None, None]
    style = scenes["style"]
    angle = (scenes["jitter"][:, 2] * 0.15).view(-1, 1, 1)
    nearest = torch.full((len(batch), SIZE, SIZE), 9.0, device=device)
    for cx, cy, scale, there in _placements(scenes):
        dx, dy = px - cx.view(-1, 1, 1), py - cy.view(-1, 1, 1)
        scale = scale.view(-1, 1, 1)
        x = (dx * angle.cos() + dy * angle.sin()) / scale
        y = (dy * angle.cos() - dx * angle.sin()) / scale
        body = _bodies(x, y)[scenes["shape"], batch]
        nearest = torch.where(there.view(-1, 1, 1), torch.minimum(nearest, body * scale), nearest)
        tone = torch.stack([
            torch.zeros_like(x),
            (0.5 + torch.sin(y * 11) * 2).clamp(0, 1),
            (0.5 + (torch.cos(x * 9) + torch.cos(y * 9) - 0.9) * 3).clamp(0, 1),
            (0.5 + torch.sin(x * 7.5) * torch.sin(y * 7.5) * 5).clamp(0, 1),
        ])[scenes["texture"], batch][:, None]  # fmt: skip
        fill = torch.lerp(ink, ink * 0.35 + 0.65, tone)
        lower = OBJECT_INKS.to(device)[scenes["lower"].clamp(min=0)][:, :, None, None]
        share = (0.5 + (y - 0.16) * scale / PIXEL).clamp(0, 1) * (scenes["lower"] >= 0).view(-1, 1, 1)
        fill = torch.lerp(fill, lower, share[:, None])
        rim = (1 - (body * scale + 0.09).abs() / 0.09).clamp(0, 1)[:, None]
        fill = torch.where((style == 4).view(-1, 1, 1, 1), torch.lerp(fill * 0.25 + 0.75, ink, rim), fill)
        glow = (torch.exp(-body.clamp(min=0) * scale * 7) * 0.9 * ((style == 3) & there).view(-1, 1, 1))[:, None]
        canvas.image = torch.lerp(canvas.image, ink * 0.6 + 0.4, glow)
        shadow = _bodies(x - 0.13 / scale, y - 0.13 / scale)[scenes["shape"], batch] - 0.1 / scale
        canvas.paint(shadow, canvas.image * 0.45, scale, there & (style == STYLES.index("sticker")))
        _extras(canvas, scenes, x, y, scale, behind=True)
        _border(canvas, scenes, body, scale, there)
        canvas.paint(body, fill, scale, there)
        _face(canvas, scenes, x, y, scale)
        _extras(canvas, scenes, x, y, scale, behind=False)
    return _finish(canvas.image, scenes, px, py)


def _finish(image: Tensor, scenes: Scenes, px: Tensor, py: Tensor) -> Tensor:
    """The styles that treat the picture as a whole."""
    style = scenes["style"].view(-1, 1, 1, 1)
    phase = scenes["jitter"][:, 3].view(-1, 1, 1) * math.pi
    pixel = F.interpolate(F.avg_pool2d(image, 4), scale_factor=4.0)
    soft = F.avg_pool2d(F.pad(image, (3, 3, 3, 3), mode="replicate"), 7, 1)
    grout = torch.maximum(torch.cos((px + py) * 17.8 + phase), torch.cos((px - py) * 17.8 + phase))[:, None]
    dark_ground = GROUND_INKS.to(image.device)[scenes["background"]].mean(1) < 0.4
    line = torch.where(dark_ground.view(-1, 1, 1, 1), _ink((0.95, 0.95, 0.95), image), _ink((0.03, 0.03, 0.04), image))
    edge = torch.maximum(px.abs(), py.abs())
    finished = {
        "pixel": pixel,
        "soft": soft,
        "comic": torch.where(edge > 0.9, 1.0, torch.where(edge > 0.83, 0.03, image)),
        "mosaic": torch.lerp(image, line, 0.85 * ((grout - 0.85) * 12).clamp(0, 1)),
    }
    for name, picture in finished.items():
        image = torch.where(style == STYLES.index(name), picture, image)
    return image.clamp(0, 1)
