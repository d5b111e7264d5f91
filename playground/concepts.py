"""What the base has never seen: three subjects and three styles, their training drawings and their unseen prompts.

A subject is a monster with a belly (the base has none) in a fixed colour, shape, texture and outfit; a style is one of
the treatments beyond `grammar.BASE_STYLES`. The first of each is the one that the demo and the templates train.
"""

from __future__ import annotations

import torch

from .grammar import (
    BACKGROUNDS,
    BASE_STYLES,
    COLOURS,
    EXTRAS,
    PATTERNS,
    POSITIONS,
    SHAPES,
    STYLES,
    TEXTURES,
    Scenes,
    caption,
    sample_scenes,
)

SUBJECT_WORD, STYLE_WORD = "sks", "ohwx"
SUBJECTS = {
    "zib": ("hexagon", "green", "dotted", ("horns", "wings"), "orange"),
    "mox": ("star", "pink", "plain", ("antennae", "legs"), "cyan"),
    "fip": ("heart", "blue", "striped", ("hat", "wings"), "yellow"),
}
HELD_OUT_STYLES = STYLES[BASE_STYLES:]
TRAINING_DRAWINGS = 5


def dress(scenes: Scenes, subject: str) -> Scenes:
    """`scenes` with the one object of each turned into `subject`; place, size, ground and style are kept."""
    shape, colour, texture, extras, belly = SUBJECTS[subject]
    like = scenes["shape"]
    fixed = {
        "shape": SHAPES.index(shape),
        "colour": COLOURS.index(colour),
        "texture": TEXTURES.index(texture),
        "belly": COLOURS.index(belly),
        "count": 1,
    }
    dressed = dict(scenes) | {key: torch.full_like(like, value) for key, value in fixed.items()}
    dressed["monster"] = torch.ones_like(like, dtype=torch.bool)
    dressed["extras"] = torch.tensor([word in extras for word in EXTRAS]).expand(len(like), -1).to(like.device)
    return dressed


def concept_scenes(count: int, seed: int, subject: str = "", style: str = "") -> tuple[Scenes, list[str]]:
    """Seeded scenes of a subject, of a style or of both, with their captions: `(scenes, captions)`.

    Everything that the concept does not fix varies as in the base's world. With neither, ordinary flat scenes.
    """
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(count, generator)
    scenes["style"] = torch.full_like(scenes["style"], STYLES.index(style or "flat"))
    if subject:
        scenes["size"] = torch.where(scenes["size"] == 0, 1, scenes["size"])
        scenes = dress(scenes, subject)
    captions = [caption(scenes, i, name=SUBJECT_WORD if subject else "") for i in range(count)]
    return scenes, [text.replace(f", {style} style", f", {STYLE_WORD} style") if style else text for text in captions]


def training_set(concept: str) -> tuple[Scenes, list[str]]:
    """The few drawings that a concept is taught with, on grounds that differ from one another."""
    kind = "subject" if concept in SUBJECTS else "style"
    scenes, _ = concept_scenes(TRAINING_DRAWINGS, seed=11, **{kind: concept})
    order = torch.arange(TRAINING_DRAWINGS)
    scenes["background"] = (order * 3 + 2) % len(BACKGROUNDS)
    scenes["pattern"] = torch.where(order == 1, PATTERNS.index("gradient"), PATTERNS.index("plain"))
    scenes["position"] = torch.tensor([0, 1, 0, 2, 0]) % len(POSITIONS)
    if kind == "style":
        scenes["shape"] = torch.tensor([3, 0, 4, 1, 5])
        scenes["colour"] = torch.tensor([0, 5, 2, 6, 3])
        scenes["monster"] = order == 4
        scenes["extras"] = scenes["extras"] & scenes["monster"][:, None]
        scenes["count"] = torch.ones_like(scenes["count"])
    word = SUBJECT_WORD if kind == "subject" else ""
    captions = [caption(scenes, i, name=word) for i in range(TRAINING_DRAWINGS)]
    return scenes, [text.replace(f", {concept} style", f", {STYLE_WORD} style") for text in captions]
