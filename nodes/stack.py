"""SODA Stack: an adapter file as one more entry of a LORA_STACK, for the nodes of other packs."""

from __future__ import annotations

from comfy_api.latest import io

from ..soda.hosts.comfy import folders
from ..soda.hosts.comfy import lora_stack as stacks
from .sockets import CATEGORY, LORA_STACK, strength_input


class SodaStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SodaStack",
            display_name="SODA Stack",
            category=CATEGORY,
            description="Adds a SODA adapter file to a LoRA stack, for SODA Mix and for other packs' stack nodes.",
            search_aliases=["lora stacker", "lora stack", "cr lora stack"],
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=folders.adapter_names(),
                    tooltip="A file in output/loras/soda or models/loras/soda, where LoRA loaders look as well.",
                ),
                strength_input("strength", "The adapter's strength for the model."),
                strength_input("strength_clip", "Its strength for the text encoder, where the adapter changes it."),
                LORA_STACK.Input("lora_stack", optional=True, tooltip="A stack to add to, from any pack's stack node."),
            ],
            outputs=[LORA_STACK.Output(display_name="LORA_STACK", tooltip="The stack with the adapter at its end.")],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str, **_) -> str:
        return folders.fingerprint(adapter_name)

    @classmethod
    def execute(cls, adapter_name: str, strength: float, strength_clip: float, lora_stack=None) -> io.NodeOutput:
        return io.NodeOutput([*(lora_stack or ()), stacks.entry(adapter_name, strength, strength_clip)])
