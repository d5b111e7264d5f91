"""SODA Convert and SODA Transport: an adapter as a LoRA or a full difference, and for another base."""

from __future__ import annotations

import os

import comfy.utils
import torch
from comfy_api.latest import io

from ..soda.convert import save_difference, save_lora
from ..soda.hosts.comfy import folders, status
from ..soda.hosts.comfy.model_weights import ModelWeights, progress
from ..soda.transport import transport
from .sockets import CATEGORY, SODA_ADAPTER

TRAINED_ON = "The model that the adapter was trained on. Patches on it do not count."
LORA, DIFFERENCE = "LoRA", "full difference"


class SodaConvert(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SodaConvert",
            display_name="SODA Convert",
            category=CATEGORY,
            description="Saves an adapter as a LoRA or as the full difference of the weights, which any LoRA loader "
            "applies to any model of the architecture, and says how much of the adapter that keeps.",
            search_aliases=["soda to lora", "extract lora", "export lora", "bake adapter", "convert adapter"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip=TRAINED_ON),
                SODA_ADAPTER.Input("adapter", tooltip="From SODA Loader, Train, Save or Mix; a mix of any kind too."),
                io.DynamicCombo.Input(
                    "to",
                    options=[
                        io.DynamicCombo.Option(
                            LORA,
                            [
                                io.Int.Input(
                                    "rank",
                                    default=64,
                                    min=1,
                                    max=1024,
                                    tooltip="More keeps more and takes more room; the node says how much.",
                                ),
                            ],
                        ),
                        io.DynamicCombo.Option(DIFFERENCE, []),
                    ],
                    tooltip="LoRA: small, keeps a part. Full difference: keeps everything, as large as the adapted "
                    "weights (SDXL: 1.9 GB).",
                ),  # fmt: skip
                io.String.Input(
                    "filename_prefix",
                    default="soda_lora",
                    tooltip="The file is output/loras/<prefix>_00001_.safetensors, counting up. May hold a subfolder.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="lora", tooltip="What was saved, for Load LoRA Model in the same workflow."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, adapter, to: dict, filename_prefix: str) -> io.NodeOutput:
        path = folders.next_save_path(filename_prefix, folders.LORAS)
        weights, show = ModelWeights(model), progress(len(adapter.layers))
        if to["to"] == LORA:
            about = save_lora(adapter, weights, path, to["rank"], torch.float16, model.load_device, show)
            kept = f"rank {to['rank']} keeps {about['energy_kept']:.0%} of the change"
        else:
            save_difference(adapter, weights, path, torch.float16, model.load_device, show)
            kept = "keeps all of the change"
        said = f"Saved {folders.shown(path)}, {os.path.getsize(path) / 1e6:.1f} MB\n{kept}"
        status.show(said, cls.hidden.unique_id)
        return io.NodeOutput(comfy.utils.load_torch_file(path, safe_load=True), ui={"text": [path]})


class SodaTransport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SodaTransport",
            display_name="SODA Transport",
            category=CATEGORY,
            description="Fits an adapter to another checkpoint than the one it was trained on: the same rotation, the "
            "spectrum as near as the other's own directions allow. Says how much that keeps.",
            search_aliases=["rebase adapter", "adapter for another checkpoint", "retarget"],
            inputs=[
                io.Model.Input("model", tooltip=TRAINED_ON),
                io.Model.Input("new_model", tooltip="The model to use the adapter on, of the same architecture."),
                SODA_ADAPTER.Input("adapter", tooltip="From SODA Loader, Train, Save or Mix."),
            ],
            outputs=[
                SODA_ADAPTER.Output(
                    display_name="adapter", tooltip="The adapter for new_model: to SODA Mix, or to SODA Save."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, new_model, adapter) -> io.NodeOutput:
        original, target = ModelWeights(model), ModelWeights(new_model)
        moved, kept = transport(
            adapter, original, target, str(target.path), model.load_device, progress(len(adapter.layers))
        )
        status.show(f"{kept:.0%} of the spectrum's change has a place in {target.path}", cls.hidden.unique_id)
        return io.NodeOutput(moved)
