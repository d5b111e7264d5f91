"""SODA Save: an adapter into a new file."""

from __future__ import annotations

from comfy_api.latest import io

from ..soda.file import load
from ..soda.hosts.comfy import folders, status
from ..soda.hosts.comfy.describe import save_described
from .sockets import CATEGORY, SODA_ADAPTER


class SodaSave(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SodaSave",
            display_name="SODA Save",
            category=CATEGORY,
            description="Saves an adapter to output/loras/soda, where SODA Loader finds it. Nothing is overwritten.",
            search_aliases=["save adapter", "export soda", "save lora"],
            is_output_node=True,
            inputs=[
                SODA_ADAPTER.Input("adapter", tooltip="The adapter to save, from SODA Train or SODA Mix."),
                io.String.Input(
                    "filename_prefix",
                    default="soda",
                    tooltip="The file is <prefix>_00001_.safetensors, counting up. May hold a subfolder.",
                ),
                io.String.Input(
                    "trigger_words",
                    default="",
                    tooltip="Words that call the adapter's subject or style in a prompt, for those who use the file.",
                ),
                io.Image.Input(
                    "thumbnail",
                    optional=True,
                    tooltip="A picture to show for the file in model managers; if none, the training's last sample.",
                ),
            ],
            outputs=[
                SODA_ADAPTER.Output(display_name="adapter", tooltip="The same adapter as read back from the file."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, adapter, filename_prefix: str, trigger_words: str, thumbnail=None) -> io.NodeOutput:
        path = folders.next_save_path(filename_prefix)
        save_described(adapter, path, trigger_words, thumbnail)
        status.show(f"Saved {folders.shown(path)}", cls.hidden.unique_id)
        return io.NodeOutput(load(path), ui={"text": [path], "soda_adapters": [path]})
