"""Subjects and styles to teach, their training drawings and their unseen prompts.

A subject is one certain monster: shape, upper and lower colour, what it wears. *pom* is of one colour, as the
base knows monsters: an individual among many. *fip* and *zib* have two, which the base has never drawn. A style is one
of the treatments beyond `grammar.BASE_STYLES`, all new to the base. The first subject and the first style are those
that the demo and the templates train.
"""

from __future__ import annotations

import torch

from .grammar import (
    BACKGROUNDS,
    BASE_STYLES,
    COLOURS,
    EXTRAS,
    SHAPES,
    STYLES,
    Scenes,
    caption,
    sample_scenes,
)

SUBJECT_WORD, STYLE_WORD = "sks", "ohwx"
SUBJECTS = {
    "pom": ("heart", "cyan", "cyan", "hat"),
    "fip": ("square", "purple", "yellow", "horns"),
    "zib": ("circle", "green", "orange", "hat"),
}
HELD_OUT_STYLES = STYLES[BASE_STYLES:]
DRAWINGS = {"subject": 10, "style": 48}  # to learn one thing, or what many things have in common


def dress(scenes: Scenes, subject: str) -> Scenes:
    """`scenes` with the one object of each turned into `subject`; place, size, ground and style are kept."""
    shape, colour, lower, outfit = SUBJECTS[subject]
    like = scenes["shape"]
    fixed = {
        "shape": SHAPES.index(shape),
        "colour": COLOURS.index(colour),
        "texture": 0,
        "lower": COLOURS.index(lower) if lower != colour else -1,
        "count": 1,
    }
    dressed = dict(scenes) | {key: torch.full_like(like, value) for key, value in fixed.items()}
    dressed["monster"] = torch.ones_like(like, dtype=torch.bool)
    dressed["extras"] = torch.tensor([word == outfit for word in EXTRAS]).expand(len(like), -1).to(like.device)
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
    return scenes, captions_of(scenes, bool(subject), style)


def training_set(concept: str) -> tuple[Scenes, list[str]]:
    """The drawings that a concept is taught with, every ground colour among them, and their captions.

    Half of a subject's are in styles that the base knows, so that the subject is not bound to the flat one; a style's
    show the whole world, so that the style is not bound to a few things.
    """
    kind = "subject" if concept in SUBJECTS else "style"
    scenes, _ = concept_scenes(DRAWINGS[kind], seed=11, **{kind: concept})
    order = torch.arange(DRAWINGS[kind])
    scenes["background"] = (order * 3 + 2) % len(BACKGROUNDS)
    if kind == "subject":
        scenes["style"] = torch.where(order % 2 == 1, order // 2 % (BASE_STYLES - 1) + 1, 0)
    return scenes, captions_of(scenes, kind == "subject", concept if kind == "style" else "")


def captions_of(scenes: Scenes, subject: bool, style: str) -> list[str]:
    """Captions with the rare words in the place of what they stand for."""
    texts = [caption(scenes, i, name=SUBJECT_WORD if subject else "") for i in range(len(scenes["shape"]))]
    return [text.replace(f", {style} style", f", {STYLE_WORD} style") if style else text for text in texts]
