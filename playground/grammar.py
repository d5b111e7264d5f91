"""Scenes of the drawn world and the captions that describe them.

A scene is a set of integer attributes. A batch of scenes is a `dict[str, Tensor]` of shape `(B,)` per attribute
(indices into the word lists below) plus the continuous placement that a caption does not tell. `sample_scenes` draws
them from a seeded generator, `caption` puts one scene into words:

    a [large] [dotted] [red] star [monster] [with horns and legs] [at the left] on a [striped] gray background
        [, pixel style]

Words are left out at random, so that the model also knows prompts that say less than the picture shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "hexagon", "cross", "ring", "moon")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
BACKGROUNDS = ("white", "black", "gray", "beige", "brown", "navy", "lavender", "mint")
TEXTURES = ("plain", "striped", "dotted", "checkered")
PATTERNS = ("plain", "striped", "dotted", "gradient")
SIZES = ("small", "medium", "large")
POSITIONS = ("center", "left", "right", "top", "bottom")
EXTRAS = ("horns", "hat", "legs", "wings", "antennae")
STYLES = ("flat", "outline", "pixel", "glow", "sketch", "soft", "comic", "gilded", "mosaic", "sticker")
BASE_STYLES = 6  # the rest is held out of the base's training
BODIES = 7  # shapes that can be a monster: the first seven have room for a face
RARE = ("sks", "ohwx", "zwx", "bnha", "lvnd", "qrx", "vtk", "phn")  # words without meaning, seen in 2 % of the captions
SCALES = (0.34, 0.46, 0.6)  # radius of an object, in half picture widths

Scenes = dict[str, Tensor]


def sample_scenes(count: int, generator: torch.Generator) -> Scenes:
    """`count` random scenes of the base world: every attribute `(count,)` int64, `extras` `(count, 5)` bool,
    `jitter` `(count, 4)` float in [-1, 1] (offset x, y, rotation, phase), on the CPU."""

    def pick(n: int) -> Tensor:
        return torch.randint(n, (count,), generator=generator)

    def chance(p: float) -> Tensor:
        return torch.rand(count, generator=generator) < p

    monster = chance(0.35)
    many = chance(0.2) & ~monster
    scenes = {
        "shape": torch.where(monster, pick(BODIES), pick(len(SHAPES))),
        "colour": pick(len(COLOURS)),
        "texture": torch.where(chance(0.5), pick(len(TEXTURES)), 0),
        "background": pick(len(BACKGROUNDS)),
        "pattern": torch.where(chance(0.4), pick(len(PATTERNS)), 0),
        "size": torch.where(chance(0.6), pick(len(SIZES)), 1),
        "position": torch.where(chance(0.5), pick(len(POSITIONS)), 0),
        "style": torch.where(chance(0.45), pick(BASE_STYLES), 0),
        "count": torch.where(many, 2 + pick(2), 1),
        "monster": monster,
        "extras": (torch.rand(count, len(EXTRAS), generator=generator) < 0.28) & monster[:, None],
        "lower": torch.full((count,), -1),
        "jitter": torch.rand(count, 4, generator=generator) * 2 - 1,
    }
    scenes["size"] = torch.where(scenes["count"] > 1, 1, scenes["size"])
    scenes["position"] = torch.where(scenes["count"] > 1, 0, scenes["position"])
    return scenes


def select(scenes: Scenes, index: Tensor | slice) -> Scenes:
    """The scenes at `index`."""
    return {key: value[index] for key, value in scenes.items()}


def caption(scenes: Scenes, i: int, generator: torch.Generator | None = None, name: str = "") -> str:
    """Scene `i` in words; with a generator, words are left out (and rare ones put in) as in the base's training.

    `name` stands for what a subject's look says by itself: colour, texture, shape and extras are then not told.
    """
    draw = (lambda: 1.0) if generator is None else (lambda: float(torch.rand((), generator=generator)))
    get = {key: value[i] for key, value in scenes.items()}
    monster = bool(get["monster"])
    style = STYLES[get["style"]]
    words: list[str] = []
    if get["size"] != 1:
        words.append(SIZES[get["size"]])
    if name:
        words.append(name)
    else:
        if get["texture"] and draw() > 0.15:
            words.append(TEXTURES[get["texture"]])
        if draw() > 0.12:
            words.append(COLOURS[get["colour"]])
        if not monster or draw() > 0.2:
            words.append(SHAPES[get["shape"]])
        if draw() < 0.02:
            words.insert(int(draw() * len(words)), RARE[int(draw() * len(RARE))])
    if monster:
        words.append("monster")
    number = int(get["count"])
    if number > 1:
        words[-1] = {"cross": "crosses"}.get(words[-1], words[-1] + "s")
        text = ("two ", "three ")[number - 2] + " ".join(words)
    else:
        text = "a " + " ".join(words)
    extras = [] if name else [word for word, has in zip(EXTRAS, get["extras"], strict=True) if has]
    if extras and draw() > 0.15:
        text += " with " + " and ".join(extras)
    if get["position"] and draw() > 0.1:
        text += " at the " + POSITIONS[get["position"]]
    if draw() > 0.08:
        pattern = PATTERNS[get["pattern"]] + " " if get["pattern"] else ""
        text += f" on a {pattern}{BACKGROUNDS[get['background']]} background"
    if style != "flat" or draw() < 0.2:
        text += f", {style} style"
    return text
