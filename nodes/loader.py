"""SODA Loader: one adapter file onto a model."""

from __future__ import annotations

from comfy_api.latest import io

from ..soda.hosts.comfy import folders, patch, status
from .sockets import CATEGORY, SODA_ADAPTER, mode_input, strength_input


class SodaLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SodaLoader",
            display_name="SODA Loader",
            category=CATEGORY,
            description="Applies a SODA adapter file to a model. Several loaders in a row add up to one mix.",
            search_aliases=["load soda", "soda adapter", "orthogonal adapter", "lora loader"],
            inputs=[
                io.Model.Input("model", tooltip="The model to adapt. It is not changed: the output is a patched copy."),
                io.Combo.Input(
                    "adapter_name",
                    options=folders.adapter_names(),
                    tooltip="A .safetensors file in models/soda, output/loras/soda or models/loras/soda.",
                ),
                strength_input(
                    "strength",
                    "How far to go from the base (0) to the adapter (1). Above 1 goes on, below 0 turns back.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Only needed for an adapter that also changes the text encoder.",
                ),
                strength_input(
                    "strength_clip",
                    "The same for the text encoder, where the adapter changes it.",
                    optional=True,
                ),
                mode_input(),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the adapter."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoder with the adapter, if one was wired."),
                SODA_ADAPTER.Output(display_name="adapter", tooltip="The file's adapter, to mix or to save again."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str, **_) -> str:
        return folders.fingerprint(adapter_name)

    @classmethod
    def execute(
        cls, model, adapter_name: str, strength: float, clip=None, strength_clip: float = 1.0, mode: str = "auto"
    ) -> io.NodeOutput:
        adapter = folders.load(adapter_name)
        new_model, new_clip, report = patch.apply(model, [(adapter, strength)], clip, [(adapter, strength_clip)], mode)
        status.show(report.text(), cls.hidden.unique_id)
        return io.NodeOutput(new_model, new_clip, adapter)
