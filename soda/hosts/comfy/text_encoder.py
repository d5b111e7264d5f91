"""A text encoder that trains along: the captions of each batch are encoded inside training, by its adapted weights.

ComfyUI's text encoders add to their residual stream in place and are small beside a diffusion model, so their blocks
are always computed again in the backward pass, from copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from ...training.recompute import copying
from .batches import Conditions, Pass
from .dataset import encoded, reworded
from .inject import Injection


class TextEncoder:
    """A CLIP with `weights` (layer name -> tensor) in place of its own, while this is entered.

    `patcher` is a clone of the CLIP's, made for training and loaded beside the diffusion model; the layers in `targets`
    (layer name -> state dict key) are those that change. The CLIP given stays as it is.
    """

    def __init__(self, clip: Any, patcher: ModelPatcher, targets: Mapping[str, str]):
        self.clip = clip.clone()
        self.clip.patcher = patcher
        self.clip.use_clip_schedule = False
        self.clip.load_model = lambda tokens: patcher  # loading it alone could push the diffusion model out
        self._injection = Injection(patcher, targets, again=True)

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        return self._injection.weights

    @weights.setter
    def weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._injection.weights = weights

    def __enter__(self) -> TextEncoder:
        self._injection.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._injection.__exit__(*error)

    def passes(self, passes: Sequence[Pass], conditions: Conditions) -> list[Pass]:
        """The same passes with their captions encoded now; differentiable in the weights."""
        texts = dict.fromkeys(caption.text for part in passes for caption in part.captions)
        with copying():
            said = {text: encoded(self.clip, text) for text in texts}
        return [replace(part, condition=self._condition(part, said, conditions)) for part in passes]

    def _condition(self, part: Pass, said: Mapping[str, list], conditions: Conditions) -> dict:
        rows = zip(part.captions, part.x0, strict=True)
        return comfy.samplers.cond_cat(
            [conditions(reworded(c.encoded, said[c.text]), latent[None], part.shapes) for c, latent in rows]
        )
