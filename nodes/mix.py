"""SODA Mix: any number of adapters, from files and from other nodes, each with a weight, as one adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from comfy_api.latest import io

from ..soda.adapter import Adapter
from ..soda.errors import SodaMixError
from ..soda.hosts.comfy import folders, patch, status
from ..soda.hosts.comfy.lora_stack import apply_loras, split
from ..soda.mixing import mix
from .sockets import CATEGORY, LORA_STACK, ROLES, SODA_ADAPTER, mode_input, strength_input

ROWS = 8
WIRED = "(wired)"  # in place of a file name


def row_id(number: int) -> str:
    """Rows count from 1. ComfyUI needs an id unlike its parent's, so the chain is row, row2, row3 ..."""
    return "row" if number == 1 else f"row{number}"


def row_input(number: int) -> io.DynamicCombo.Input:
    """A row: none, or a file or the next connected socket, with weight, role and the next row.

    Rows are chained rather than counted: adding one keeps the values of those before it in both frontends. Sockets
    stand outside the rows, since a socket inside a chain loses its link when a workflow is reloaded.
    """
    inputs: list[io.Input] = [
        io.Combo.Input(
            "adapter_name",
            options=[WIRED, *folders.adapter_names()],
            default=WIRED,
            tooltip="A file, or (wired) for the next connected adapter socket: the first (wired) row weighs the first "
            "connected socket, the second the second.",
        ),
        strength_input("weight", "How much of this adapter: 0 none, 1 as trained, negative turns the other way."),
        io.Combo.Input(
            "role",
            options=["auto", *ROLES],
            default="auto",
            tooltip="What the adapter is for; auto takes what its file says. Recorded in the mix.",
        ),
    ]
    if number < ROWS:
        inputs.append(row_input(number + 1))
    # One option that nests, not one for files and one for sockets: the schema would double with every row.
    return io.DynamicCombo.Input(
        row_id(number),
        options=[io.DynamicCombo.Option("none", []), io.DynamicCombo.Option("adapter", inputs)],
        tooltip=f"Adapter {number} of the mix; none ends the list.",
    )


def filled_rows(row: dict) -> Iterator[dict]:
    """The values of every row before the first none, as ComfyUI nests them."""
    for number in range(1, ROWS + 1):
        if row[row_id(number)] == "none":
            return
        yield row
        if number < ROWS:
            row = row[row_id(number + 1)]


def row_prefixes(inputs: Mapping[str, object]) -> Iterator[str]:
    """What the names of each filled row's inputs begin with in a prompt: "row.", "row.row2." ..."""
    prefix = ""
    for number in range(1, ROWS + 1):
        name = prefix + row_id(number)
        if inputs.get(name) != "adapter":
            return
        prefix = f"{name}."
        yield prefix


def parts(row: dict, sockets: dict) -> list[tuple[Adapter, float]]:
    """(adapter, weight) of all rows, then of connected sockets that no row weighs, with weight 1."""
    wired = [sockets[name] for name in sorted(sockets, key=lambda name: int(name.removeprefix("adapter")))]
    found = []
    for values in filled_rows(row):
        if values["adapter_name"] != WIRED:
            adapter = folders.load(values["adapter_name"])
        elif wired:
            adapter = wired.pop(0)
        else:
            raise SodaMixError(f"There are more {WIRED} rows than connected adapter sockets: wire one or remove a row.")
        if values["role"] != "auto":
            adapter = replace(adapter, metadata={**adapter.metadata, "soda.role": values["role"]})
        found.append((adapter, values["weight"]))
    return found + [(adapter, 1.0) for adapter in wired]


class SodaMix(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SodaMix",
            display_name="SODA Mix",
            category=CATEGORY,
            description="Blends adapters into one and applies it to a model. The order of the rows does not matter.",
            search_aliases=["merge adapters", "blend soda", "style mixing", "lora stack"],
            inputs=[
                io.Model.Input("model", tooltip="The model to adapt. It is not changed: the output is a patched copy."),
                row_input(1),
                io.Autogrow.Input(
                    "adapters",
                    template=io.Autogrow.TemplatePrefix(
                        SODA_ADAPTER.Input("adapter", tooltip="An adapter from SODA Train, Save, Loader or Mix."),
                        prefix="adapter",
                        min=0,
                        max=ROWS,
                    ),
                    tooltip="Adapters from other nodes. Without a (wired) row they count with weight 1.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Needed for adapters that also change the text encoder, and for such LoRAs in the stack.",
                ),
                LORA_STACK.Input(
                    "lora_stack",
                    optional=True,
                    tooltip="From SODA Stack or any pack's LoRA stack node. Its SODA files join the mix, its LoRAs are "
                    "applied on top.",
                ),
                mode_input(),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the mix."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoder with the mix, if one was wired."),
                SODA_ADAPTER.Output(display_name="adapter", tooltip="The mix as one adapter, to save or mix further."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, row: dict, **_) -> list[str]:
        names = [values["adapter_name"] for values in filled_rows(row)]
        return [name if name == WIRED else folders.fingerprint(name) for name in names]

    @classmethod
    def execute(
        cls, model, row: dict, adapters: dict | None = None, clip=None, lora_stack=None, mode: str = "auto"
    ) -> io.NodeOutput:
        picked = parts(row, adapters or {})
        stacked, loras = split(lora_stack or ())
        if not picked and lora_stack is None:
            raise SodaMixError("There is no adapter to mix: pick a file in the first row or wire an adapter.")
        together = picked + [(adapter, strength) for adapter, strength, _ in stacked]
        clip_parts = picked + [(adapter, strength) for adapter, _, strength in stacked]
        new_model, new_clip, report = patch.apply(model, together, clip, clip_parts, mode)
        new_model, new_clip = apply_loras(new_model, new_clip, loras)
        if loras:
            report.warnings.append(f"{len(loras)} LoRA{'s' * (len(loras) > 1)} of the stack on top")
        mixed = mix(together, "mix") if together else Adapter({}, {}, "nothing")
        single, reason = mixed.is_single_form()
        if not single:
            report.warnings.append(f"This mix works but cannot be saved as one SODA file: {reason}")
        status.show(report.text(), cls.hidden.unique_id)
        return io.NodeOutput(new_model, new_clip, mixed)
