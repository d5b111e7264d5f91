"""The playground as nodes: a small model to try everything on, and the drawings of the two concepts it lacks."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..playground.concepts import HELD_OUT_STYLES, SUBJECTS, training_set
from ..playground.drawing import draw
from ..soda.hosts.comfy import playground
from .sockets import CATEGORY

CHECKPOINT = Path(__file__).parents[1] / "playground" / "model.safetensors"


class SodaPlayground(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SodaPlayground",
            display_name="SODA Playground",
            category=CATEGORY,
            description="A small text-to-image model of drawn shapes and monsters, 64x64, that runs on any computer. "
            "It comes with the pack: nothing is downloaded.",
            search_aliases=["toy model", "demo model", "test checkpoint"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The diffusion model, for KSampler and SODA Train."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoder, for CLIP Text Encode."),
                io.Vae.Output(display_name="VAE", tooltip="The pixel-space VAE, for VAE Decode and VAE Encode."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        path = str(CHECKPOINT)
        return io.NodeOutput(playground.load_model(path), playground.load_clip(path), playground.load_vae())


class SodaPlaygroundDrawings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SodaPlaygroundDrawings",
            display_name="SODA Playground Drawings",
            category=CATEGORY,
            description="Drawings, with captions, of a subject or a style that the playground model has never "
            "seen: a data set to train a first adapter on.",
            search_aliases=["training images", "example dataset"],
            inputs=[
                io.Combo.Input(
                    "concept",
                    options=[*SUBJECTS, *HELD_OUT_STYLES],
                    default=next(iter(SUBJECTS)),
                    tooltip=f"{', '.join(SUBJECTS)} are subjects, written 'sks monster' in the captions; "
                    f"{', '.join(HELD_OUT_STYLES)} are styles, written 'ohwx style'.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True, tooltip="The drawings, 64x64."),
                io.String.Output(display_name="texts", is_output_list=True, tooltip="One caption for each drawing."),
            ],
        )

    @classmethod
    def execute(cls, concept: str) -> io.NodeOutput:
        scenes, captions = training_set(concept)
        pictures = draw(scenes).movedim(1, -1)
        return io.NodeOutput(list(pictures.split(1)), captions)
