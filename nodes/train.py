"""SODA Train: an adapter from a few images and their captions, inside the graph."""

from __future__ import annotations

import logging

from comfy_api.latest import io, ui

from ..soda.adapter import DECOMPOSITIONS
from ..soda.errors import SodaTrainingError
from ..soda.file import save
from ..soda.hosts.comfy import dataset, folders
from ..soda.hosts.comfy.preview import SamplePrompt
from ..soda.hosts.comfy.progress import TrainingProgress
from ..soda.hosts.comfy.targets import TARGETS
from ..soda.hosts.comfy.train import train_adapter
from ..soda.training.loop import TrainingSettings
from .sockets import CATEGORY, ROLES, SODA_ADAPTER

log = logging.getLogger(__name__)


class SodaTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SodaTrain",
            display_name="SODA Train",
            category=CATEGORY,
            description="Trains a SODA adapter on a model's attention weights. The model itself is left as it is.",
            search_aliases=["train adapter", "train lora", "fine-tune", "dreambooth"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to train on. It is not changed."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The captions: one for each image in the same order, or a single one for all.",
                ),
                io.Latent.Input(
                    "latents",
                    optional=True,
                    tooltip="The encoded images, for instance from Make Training Dataset. Sizes may differ.",
                ),
                io.Int.Input("steps", default=200, min=1, max=100000, tooltip="How many training steps to take."),
                io.Float.Input(
                    "learning_rate",
                    default=0.01,
                    min=0.000001,
                    max=1.0,
                    step=0.000001,
                    tooltip="Step size of rotation and spectrum. Lower it if the loss rises or turns NaN.",
                ),
                io.Int.Input("batch_size", default=4, min=1, max=10000, tooltip="Images per step; more is steadier."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Fixes the order of images, the noise and the noise levels.",
                ),
                io.Combo.Input(
                    "decomposition",
                    options=list(DECOMPOSITIONS),
                    default="lq",
                    tooltip="lq also works on fine-tuned bases; svd only on this very base; qr turns the output side; "
                    "none trains the rotation alone.",
                ),
                io.Int.Input(
                    "factors",
                    default=3,
                    min=1,
                    max=5,
                    tooltip="Kronecker factors of the rotation: fewer are larger and more expressive.",
                ),
                io.Combo.Input("role", options=ROLES, default="subject", tooltip="What it learns; kept in the file."),
                io.Combo.Input(
                    "targets",
                    options=list(TARGETS),
                    default="all attention",
                    tooltip="Which weights to train. A subject on cross-attention and a style on self-attention share "
                    "no weight and mix best.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="With vae and sample_prompt: for samples on the way."),
                io.Vae.Input("vae", optional=True, tooltip="Encodes images; also decodes samples on the way."),
                io.Image.Input("images", optional=True, tooltip="Images to encode with the vae when no latents come."),
                io.String.Input(
                    "sample_prompt",
                    default="",
                    optional=True,
                    multiline=True,
                    tooltip="Shows a sample of this prompt at every quarter of the training. Needs clip and vae.",
                ),
            ],
            outputs=[
                SODA_ADAPTER.Output(display_name="adapter", tooltip="The trained adapter, for SODA Save or SODA Mix."),
                io.LossMap.Output(display_name="loss_map", tooltip="The loss of every step, for Plot Loss Graph."),
                io.Int.Output(display_name="steps", tooltip="The number of steps taken."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            has_intermediate_output=True,  # the strip of samples
        )

    @classmethod
    def execute(
        cls, model, positive, steps, learning_rate, batch_size, seed, decomposition, factors, role, targets,
        latents=None, clip=None, vae=None, images=None, sample_prompt=None,
    ) -> io.NodeOutput:  # fmt: skip
        clip, vae, text = (value[0] if value else None for value in (clip, vae, sample_prompt))
        samples = dataset.collect(latents if latents is not None else dataset.encode(images, vae), positive)
        prompt = None
        if text:
            if clip is None or vae is None:
                raise SodaTrainingError("sample_prompt needs a clip and a vae to show samples: wire both, or empty it.")
            prompt = SamplePrompt(clip, vae, text, seed[0])
        settings = TrainingSettings(
            steps=steps[0], learning_rate=learning_rate[0], batch_size=batch_size[0], seed=seed[0]
        )
        workflow = ((cls.hidden.extra_pnginfo or {}).get("workflow") or {}).get("id")
        with TrainingProgress(settings.steps, cls.hidden.unique_id, workflow) as progress:
            adapter, losses = train_adapter(
                model[0], samples, settings, decomposition[0], factors[0], role[0], progress, prompt, targets[0]
            )
        # ComfyUI may drop a result from its cache under memory pressure, and hours of training with it.
        path = folders.autosave_path()
        save(adapter, path)
        log.info("SODA Train: until ComfyUI restarts the adapter is also kept in %s", path)
        shown = None
        if progress.strip.samples:
            shown = ui.ImageSaveHelper.get_save_images_ui(progress.strip.tensor(), "soda/training", cls)
        return io.NodeOutput(adapter, {"loss": losses}, len(losses), ui=shown)
