"""Prompts as a page would send them, built a node at a time, and what the tests read from their results."""

import uuid
from collections.abc import Sequence

import safetensors.torch
from torch import Tensor

PIXELS = 32  # the playground is made for 64; less is faster and as good for comparing
TEXT = "a red circle on a blue background"


class Prompt(dict):
    """API format: {id: {class_type, inputs}}. `add` returns the new node's id; (id, slot) is a link."""

    def add(self, class_type: str, **inputs: object) -> str:
        node = str(len(self) + 1)
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in inputs.items()}
        self[node] = {"class_type": class_type, "inputs": values}
        return node


class Playground:
    """The links of the small built-in model in a prompt."""

    def __init__(self, prompt: Prompt) -> None:
        node = prompt.add("SodaPlayground")
        self.prompt, self.model, self.clip, self.vae = prompt, (node, 0), (node, 1), (node, 2)

    def text(self, text: str = TEXT) -> tuple[str, int]:
        return (self.prompt.add("CLIPTextEncode", text=text, clip=self.clip), 0)

    def sample(self, model: tuple[str, int], seed: int = 1, again: bool = False) -> str:
        """Three steps of the stock sampler, the latent saved in fp32 -> the saving node.

        At cfg 1 the negative prompt has no effect on the numbers, so a new one makes ComfyUI sample `again`
        with the models it holds instead of answering from its cache.
        """
        negative = self.text(uuid.uuid4().hex if again else "")
        latent = (self.prompt.add("EmptyLatentImage", width=PIXELS, height=PIXELS, batch_size=1), 0)
        sampled = self.prompt.add(
            "KSampler", model=model, positive=self.text(), negative=negative, latent_image=latent, seed=seed, steps=3,
            cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0,
        )  # fmt: skip
        return self.prompt.add("SaveLatent", samples=(sampled, 0), filename_prefix="latents/test")

    def drawings(self, concept: str = "fip") -> tuple[tuple[str, int], tuple[str, int]]:
        """Latents and conditioning of the built-in drawings, as lists, through core's own dataset node."""
        drawings = self.prompt.add("SodaPlaygroundDrawings", concept=concept)
        return self.dataset((drawings, 0), (drawings, 1))

    def dataset(self, images, texts) -> tuple[tuple[str, int], tuple[str, int]]:
        node = self.prompt.add("MakeTrainingDataset", images=images, texts=texts, vae=self.vae, clip=self.clip)
        return (node, 0), (node, 1)

    def train(self, positive, **values: object) -> str:
        settings = {"steps": 3, "learning_rate": 0.01, "batch_size": 2, "seed": 5, "decomposition": "lq", "factors": 3,
                    "role": "subject", "targets": "all attention", "sample_prompt": ""}  # fmt: skip
        return self.prompt.add("SodaTrain", model=self.model, positive=positive, **{**settings, **values})

    def options(self, **values: object) -> tuple[str, int]:
        """SODA Train Options, as they stand but for `values`; those of a nested choice as `"loss.beta"`."""
        settings = {"loss": "plain", "min_snr_gamma": 0.0, "timesteps": "even", "caption_dropout": 0.0,
                    "noise_offset": 0.0, "schedule": "cosine", "warm_up": 0.05, "spectrum_rate": 1.0,
                    "accumulation": 1, "gradient_clip": 1.0, "ema": 0.0, "prior_weight": 1.0, "checkpoint_every": 100,
                    "sample_every": 0, "memory": "auto", "layers": "", "augment": "off"}  # fmt: skip
        return (self.prompt.add("SodaTrainOptions", **{**settings, **values}), 0)

    def save(self, adapter: tuple[str, int], prefix: str) -> str:
        return self.prompt.add("SodaSave", adapter=adapter, filename_prefix=prefix, trigger_words="sks")

    def load(self, name: str, strength: float = 1.0, model: tuple[str, int] | None = None) -> str:
        return self.prompt.add("SodaLoader", model=model or self.model, adapter_name=name, strength=strength)

    def mix(self, parts: Sequence[tuple[str, float]], model: tuple[str, int] | None = None) -> str:
        """Adapter files with weights in the node's chained rows."""
        inputs, prefix = {}, ""
        for number, (name, weight) in enumerate(parts, 1):
            row = f"{prefix}row{number if number > 1 else ''}"
            inputs |= {row: "adapter", f"{row}.adapter_name": name, f"{row}.weight": weight, f"{row}.role": "auto"}
            prefix = f"{row}."
        inputs[f"{prefix}{'row' if not parts else f'row{len(parts) + 1}'}"] = "none"
        return self.prompt.add("SodaMix", model=model or self.model, **inputs)


def latent_of(client, result, node: str) -> Tensor:
    """The fp32 tensor that a SaveLatent node wrote."""
    return safetensors.torch.load(client.view(result.outputs[node]["latents"][0]))["latent_tensor"]
