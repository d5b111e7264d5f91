"""SODA Train Options: what a training may have beyond the settings that everyone needs."""

from __future__ import annotations

from comfy_api.latest import io

from ..soda.hosts.comfy.augment import Augment
from ..soda.hosts.comfy.memory import AUTO, MEMORY
from ..soda.hosts.comfy.options import TrainingOptions
from ..soda.training.schedule import SHAPES
from ..soda.training.timesteps import Timesteps
from .sockets import CATEGORY, SODA_TRAIN_OPTIONS


def number(
    name: str, default: float, least: float, most: float, step: float, tooltip: str, optional: bool = False
) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=least, max=most, step=step, tooltip=tooltip, optional=optional)


class SodaTrainOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SodaTrainOptions",
            display_name="SODA Train Options",
            category=CATEGORY,
            description="Objective, schedule, augmentation and other options of SODA Train. As they stand they change "
            "nothing.",
            search_aliases=["training settings", "dco", "min snr", "ema", "augmentation", "learning rate schedule"],
            inputs=[
                io.DynamicCombo.Input(
                    "loss",
                    options=[
                        io.DynamicCombo.Option("plain", []),
                        io.DynamicCombo.Option(
                            "dco",
                            [number("beta", 1000.0, 1.0, 100000.0, 100.0, "Higher: nearer to the model as it is.")],
                        ),
                    ],
                    tooltip="plain: the model's own training loss. dco: also asks the model without the adapter and "
                    "learns only what that does worse; keeps more of the model, takes 1.3 times as long.",
                ),
                number(
                    "min_snr_gamma", 0.0, 0.0, 100.0, 0.5,
                    "Makes easy noise levels count less; 5 is usual for noise prediction (SD 1.5, SDXL). 0: off.",
                ),
                io.DynamicCombo.Input(
                    "timesteps",
                    options=[
                        io.DynamicCombo.Option("even", []),
                        io.DynamicCombo.Option("uniform", []),
                        io.DynamicCombo.Option(
                            "logit-normal",
                            [
                                number("mean", 0.0, -5.0, 5.0, 0.1, "Above 0: more noise (layout); below: detail."),
                                number("std", 1.0, 0.1, 5.0, 0.1, "How far the noise levels spread around the mean."),
                            ],
                        ),
                        io.DynamicCombo.Option(
                            "shifted",
                            [number("shift", 3.0, 0.1, 20.0, 0.1, "Above 1: more noise; below: less.")],
                        ),
                    ],
                    tooltip="Which noise levels are trained. even: all alike, spread over each batch (steady). "
                    "uniform: drawn freely. logit-normal: mostly the middle. shifted: mostly high or low noise.",
                ),
                number(
                    "caption_dropout", 0.0, 0.0, 1.0, 0.05,
                    "How often a caption is replaced by the empty one, so that guidance works without words too. Needs "
                    "a clip on SODA Train.",
                ),
                number("noise_offset", 0.0, 0.0, 1.0, 0.01, "For very dark or bright pictures: 0.05 to 0.1. 0: off."),
                io.Combo.Input(
                    "schedule",
                    options=list(SHAPES),
                    default="cosine",
                    tooltip="How the learning rate falls: along a half cosine, straight, or not at all.",
                ),
                number("warm_up", 0.05, 0.0, 1.0, 0.01, "The share of the steps in which the rate rises from 0."),
                number("spectrum_rate", 1.0, 0.0, 1000.0, 0.1, "Rate of the spectrum, times the learning rate."),
                io.Int.Input(
                    "accumulation",
                    default=1,
                    min=1,
                    max=10000,
                    tooltip="Batches per step: like a larger batch in the memory of one, and as much slower.",
                ),
                number("gradient_clip", 1.0, 0.0, 1000.0, 0.1, "The largest gradient that a step follows. 0: any."),
                number(
                    "ema", 0.0, 0.0, 0.9999, 0.0001,
                    "Returns an average of the last steps, with this decay: 0.98 is the last 50. 0: the last step.",
                ),
                number("prior_weight", 1.0, 0.0, 1000.0, 0.1, "How much the prior pictures count."),
                io.Int.Input(
                    "checkpoint_every",
                    default=100,
                    min=1,
                    max=100000,
                    tooltip="A crash or a power cut loses at most this many steps. Cancelling loses none.",
                ),
                io.Int.Input(
                    "sample_every",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip="Steps from one sample of SODA Train's sample_prompt to the next. 0: one at each quarter.",
                ),
                io.Combo.Input(
                    "memory",
                    options=list(MEMORY),
                    default=AUTO,
                    tooltip="auto: the fastest plan that fits the free memory. fast: everything at once. frugal: about "
                    "a third more arithmetic, far less memory. low VRAM: the model stays in main memory as well.",
                ),
                io.String.Input(
                    "layers",
                    default="",
                    tooltip="Only layers with such names, out of the targets: *output_blocks*attn1* for instance. "
                    "Empty: all.",
                ),
                io.DynamicCombo.Input(
                    "augment",
                    options=[
                        io.DynamicCombo.Option("off", []),
                        io.DynamicCombo.Option(
                            "on",
                            [
                                io.Int.Input("views", default=4, min=1, max=64, tooltip="Of each image, with itself."),
                                io.Boolean.Input("flip", default=True, tooltip="Mirror every second view, by chance."),
                                number("crop", 0.1, 0.0, 0.5, 0.05, "The largest share of a side that is cut off."),
                                number("colour", 0.0, 0.0, 0.9, 0.05, "The largest change of brightness and colours."),
                            ],
                        ),
                    ],
                    tooltip="Varied views of every image, made before training. Needs images and vae on SODA Train.",
                ),
                number(
                    "text_encoder_rate", 0.0, 0.0, 1000.0, 0.1,
                    "Trains the text encoder too: its rate, times the learning rate; 0: off. Needs clip and texts on "
                    "SODA Train.",
                    optional=True,
                ),
            ],
            outputs=[SODA_TRAIN_OPTIONS.Output(display_name="options", tooltip="For the options of SODA Train.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, loss: dict, timesteps: dict, memory: str, layers: str, augment: dict, sample_every: int, **settings
    ) -> io.NodeOutput:
        objective = {key: value for key, value in loss.items() if key != "loss"}
        levels = Timesteps(timesteps["timesteps"], **{k: v for k, v in timesteps.items() if k != "timesteps"})
        varied = {key: value for key, value in augment.items() if key != "augment"}
        together = {**settings, "loss": loss["loss"], **objective, "timesteps": levels}
        return io.NodeOutput(
            TrainingOptions(
                together,
                layers.strip(),
                Augment(**varied) if augment["augment"] == "on" else None,
                sample_every,
                memory,
            )
        )
