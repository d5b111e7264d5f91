"""Training samples out of the list forms of ComfyUI's dataset nodes.

LATENT and CONDITIONING arrive as lists: of latent dicts that each hold one or more samples, and of conditioning
lists that each hold one or more captions. One caption for all samples is fine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from comfy.model_patcher import ModelPatcher

from ...errors import SodaTrainingError
from .nested import Shapes, split


@dataclass(frozen=True)
class Sample:
    """One training image: a latent (1, C, H, W) as the VAE gave it, or packed (see `nested`) with the shapes of its
    parts, and its caption as ComfyUI encodes it; the words of that where a text encoder trains along."""

    latent: torch.Tensor
    shapes: Shapes
    caption: list  # [tensor (1, tokens, width), dict]
    text: str = ""


def collect(latents: Sequence[dict], positive: Sequence[list], kind: str = "latent") -> list[Sample]:
    """Pair every latent with its caption, in order; `kind` is what errors call one. Wrong counts and numbers raise
    SodaTrainingError."""
    images = [(_normal(one), shapes) for latent in latents for one, shapes in split(latent["samples"])]
    captions = [caption for conditioning in positive for caption in conditioning]
    if not images:
        raise SodaTrainingError(f"There are no {kind}s to train on: wire at least one encoded image.")
    if not captions:
        raise SodaTrainingError(
            f"There is no caption to train with for the {kind}s: wire a conditioning, as from CLIP Text Encode."
        )
    if len(captions) not in (1, len(images)):
        raise SodaTrainingError(
            f"There are {len(images)} {kind}s but {len(captions)} captions. "
            "Give one caption for each image in the same order, or a single caption for all of them."
        )
    for index, (image, _) in enumerate(images):
        which = f"{kind.capitalize()} {index + 1} of {len(images)}"
        if not torch.isfinite(image).all():
            raise SodaTrainingError(f"{which} holds NaN or infinity. Encode it again.")
        if not image.any():
            raise SodaTrainingError(
                f"{which} is empty, as from Empty Latent Image. Wire encoded images, as from VAE Encode."
            )
    if len(captions) == 1:
        captions *= len(images)
    return [Sample(*image, caption) for image, caption in zip(images, captions, strict=True)]


def must_fit(samples: Sequence[Sample], patcher: ModelPatcher, kind: str = "latent") -> None:
    """Raises SodaTrainingError for latents that are another model's."""
    form = patcher.model.latent_format
    inside = torch.zeros(1, form.latent_channels, *[2] * form.latent_dimensions)
    wanted, *places = form.process_out(inside).shape[1:]  # as the VAE has it, which is not always as the model has it
    for index, sample in enumerate(samples):
        if len(sample.shapes) > 1:  # whose formats ComfyUI knows in part only
            continue
        channels, *sizes = sample.latent.shape[1:]
        if channels != wanted or len(sizes) != len(places):
            raise SodaTrainingError(
                f"{kind.capitalize()} {index + 1} of {len(samples)} has {channels} channels in {len(sizes)} "
                f"dimensions, but the model {type(patcher.model).__name__} takes {wanted} in {len(places)}. Encode the "
                "images with the VAE that belongs to this model."
            )


def encode(images: Sequence[torch.Tensor] | None, vae) -> list[dict]:
    """Latent dicts of a list of images, each (B, H, W, 3 or 4) in 0 to 1."""
    if not images or vae is None:
        raise SodaTrainingError("There is nothing to train on: wire latents, or images together with a VAE.")
    # One by one: some VAEs take a batch for the frames of a video.
    return [{"samples": vae.encode(one[:, :, :, :3])} for image in images for one in image.split(1)]


def with_texts(samples: Sequence[Sample], texts: Sequence[str] | None, clip, name: str = "texts") -> list[Sample]:
    """The samples with captions of these words, as the clip says them; of their own captions what else is in there
    stays. `name` is that of the texts' input. Wrong counts and missing inputs raise SodaTrainingError."""
    if clip is None or not texts:
        raise SodaTrainingError(
            f"text_encoder_rate trains the text encoder on the words of the captions: wire clip and {name} into SODA "
            "Train, or set it to 0 in SODA Train Options."
        )
    if len(texts) not in (1, len(samples)):
        raise SodaTrainingError(
            f"There are {len(samples)} latents but {len(texts)} {name}. "
            "Give one text for each image in the same order, or a single text for all of them."
        )
    said = {text: encoded(clip, text) for text in dict.fromkeys(texts)}
    pairs = zip(samples, texts if len(texts) > 1 else [texts[0]] * len(samples), strict=True)
    return [replace(sample, caption=reworded(sample.caption, said[text]), text=text) for sample, text in pairs]


def encoded(clip, text: str) -> list:
    """A caption as ComfyUI encodes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]


def reworded(caption: list, said: list) -> list:
    """The caption with what was said in place of its own words, and all else that it holds."""
    return [said[0], {**caption[1], **said[1]}]


def buckets(samples: Sequence[Sample]) -> list[list[int]]:
    """Indices of samples of one shape, for every shape, in the order of first appearance."""
    by_shape: dict[Shapes, list[int]] = {}
    for index, sample in enumerate(samples):
        by_shape.setdefault(sample.shapes, []).append(index)
    return list(by_shape.values())


def draw(groups: Sequence[Sequence[int]], batch_size: int, generator: torch.Generator) -> list[int]:
    """A batch of indices out of one bucket, chosen with a chance proportional to its size.

    No sample comes twice before all of the bucket came once, so batches may be larger than the bucket.
    """
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.float64)
    group = groups[int(torch.multinomial(sizes, 1, generator=generator))]
    order: list[int] = []
    while len(order) < batch_size:
        order += torch.randperm(len(group), generator=generator).tolist()
    return [group[index] for index in order[:batch_size]]


def _normal(tensor: torch.Tensor) -> torch.Tensor:
    """ComfyUI computes under inference mode; such tensors cannot take part in training, a copy can."""
    return tensor.clone() if tensor.is_inference() else tensor
