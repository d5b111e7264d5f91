"""SODA Train: an adapter from a few images and their captions, inside the graph."""

from __future__ import annotations

import json

from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..soda.adapter import DECOMPOSITIONS
from ..soda.errors import SodaFileError, SodaTrainingError
from ..soda.hosts.comfy import augment, dataset
from ..soda.hosts.comfy.chosen import AUTO, resolve
from ..soda.hosts.comfy.options import TrainingOptions
from ..soda.hosts.comfy.preview import SamplePrompt
from ..soda.hosts.comfy.progress import TrainingProgress
from ..soda.hosts.comfy.targets import TARGETS
from ..soda.hosts.comfy.task import Extras, Task
from ..soda.hosts.comfy.train import train_or_reuse
from ..soda.training.presets import LEARNING_RATES
from ..soda.training.settings import TrainingSettings
from .sockets import CATEGORY, ROLES, SODA_ADAPTER, SODA_TRAIN_OPTIONS


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
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.000001,
                    tooltip="Step size of rotation and spectrum; lower it if the loss rises. 0: by the targets ("
                    + ", ".join(f"{rate:g} for {targets}" for targets, rate in LEARNING_RATES.items())
                    + "), and the node says which.",
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
                    options=[AUTO, *TARGETS],
                    default=AUTO,
                    tooltip="Which weights to train. auto: cross-attention for a subject, self-attention for a style "
                    "(they share no weight and mix best), all attention for other.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="With vae and sample_prompt: for samples on the way. Also for caption dropout, and to "
                    "train the text encoder (text_encoder_rate in SODA Train Options). It is not changed.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Encodes images; also decodes samples on the way."),
                io.Image.Input("images", optional=True, tooltip="Images to encode with the vae when no latents come."),
                io.String.Input(
                    "sample_prompt",
                    default="",
                    optional=True,
                    multiline=True,
                    tooltip="Shows a sample of this prompt at every quarter of the training, or as often as "
                    "sample_every in SODA Train Options says. Needs clip and vae.",
                ),
                SODA_TRAIN_OPTIONS.Input("options", optional=True, tooltip="From SODA Train Options."),
                SODA_ADAPTER.Input(
                    "start_from",
                    optional=True,
                    tooltip="An adapter to go on from: its weights are the start, its steps do not count.",
                ),
                io.Latent.Input(
                    "prior_latents",
                    optional=True,
                    tooltip="Encoded pictures of the subject's kind (other dogs), which the model shall go on drawing.",
                ),
                io.Conditioning.Input("prior_positive", optional=True, tooltip="The captions of the prior pictures."),
                io.Boolean.Input(
                    "reuse",
                    default=True,
                    optional=True,
                    tooltip="On: the same inputs give back the finished adapter at once, or go on from the last "
                    "checkpoint. Off: train from the first step.",
                ),
                io.String.Input(
                    "texts",
                    optional=True,
                    force_input=True,
                    tooltip="The words of the captions, as they went into Make Training Dataset: one for each image in "
                    "the same order, or a single one for all. Only to train the text encoder.",
                ),
                io.String.Input(
                    "prior_texts",
                    optional=True,
                    force_input=True,
                    tooltip="The words of the prior captions. Only to train the text encoder beside prior pictures.",
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
        latents=None, clip=None, vae=None, images=None, sample_prompt=None, options=None, start_from=None,
        prior_latents=None, prior_positive=None, reuse=None, texts=None, prior_texts=None,
    ) -> io.NodeOutput:  # fmt: skip
        model, seed, role, targets = model[0], seed[0], role[0], targets[0]
        clip, vae, text, start_from = (v[0] if v else None for v in (clip, vae, sample_prompt, start_from))
        options = options[0] if options else TrainingOptions({})
        encoded = latents if latents is not None else dataset.encode(images, vae)
        samples = dataset.collect(encoded, positive)
        dataset.must_fit(samples, model)
        speaking = options.settings.get("text_encoder_rate", 0.0) > 0
        if speaking:
            samples = dataset.with_texts(samples, texts, clip)
        if options.augment is not None:
            if latents is not None:
                raise SodaTrainingError(
                    "augment varies images before they are encoded: wire images and vae in place of latents, or set "
                    "augment to off in SODA Train Options."
                )
            samples = augment.views(samples, images, vae, options.augment, seed)
        if (prior_latents is None) != (prior_positive is None):
            raise SodaTrainingError(
                "Prior pictures need captions: wire both prior_latents and prior_positive, or none."
            )
        prior = []
        if prior_latents is not None:
            prior = dataset.collect(prior_latents, prior_positive, "prior latent")
            dataset.must_fit(prior, model, "prior latent")
        if prior and speaking:
            prior = dataset.with_texts(prior, prior_texts, clip, "prior_texts")
        prompt = None
        if text:
            if clip is None or vae is None:
                raise SodaTrainingError("sample_prompt needs a clip and a vae to show samples: wire both, or empty it.")
            prompt = SamplePrompt(clip, vae, text, seed, options.sample_every)
        workflow = ((cls.hidden.extra_pnginfo or {}).get("workflow") or {}).get("id")
        progress = TrainingProgress(steps[0], cls.hidden.unique_id, workflow)
        targets = resolve(model, targets, role)
        rate = learning_rate[0]
        if not rate:
            rate = LEARNING_RATES.get(targets, LEARNING_RATES["all attention"])
            progress.note(f"Trains {targets} at the learning rate {rate:g}.")
        if texts and not speaking:
            progress.note("The texts are not used: text_encoder_rate in SODA Train Options is 0.")
        settings = TrainingSettings(
            steps=steps[0], learning_rate=rate, batch_size=batch_size[0], seed=seed, **options.settings
        )
        extras = Extras(
            layers=options.layers,
            start_from=start_from,
            prior=prior,
            empty=dataset.encoded(clip, "") if settings.caption_dropout and clip is not None else None,
            clip=clip if speaking else None,
        )
        task = Task(model, samples, settings, decomposition[0], factors[0], role, targets, extras)
        try:
            with progress:
                adapter, losses = train_or_reuse(task, progress, prompt, reuse[0] if reuse else True, options.memory)
        except BaseException:
            strip = cls._save_strip(progress)
            if strip is not None:
                progress.note("The samples so far are saved as {subfolder}/{filename}.".format(**strip.results[0]))
            raise
        return io.NodeOutput(adapter, {"loss": losses}, len(losses), ui=cls._save_strip(progress))

    @classmethod
    def _save_strip(cls, progress: TrainingProgress) -> ui.SavedImages | None:
        """The samples side by side in the output folder; a full disk is no reason to lose a training."""
        if not progress.strip.samples:
            return None
        about = {} if args.disable_metadata else {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
        try:
            subfolder, name = progress.strip.save({key: json.dumps(value) for key, value in about.items() if value})
        except (OSError, SodaFileError) as error:
            progress.note(f"The strip of samples could not be saved: {error}.")
            return None
        return ui.SavedImages([ui.SavedResult(name, subfolder, io.FolderType.output)])
