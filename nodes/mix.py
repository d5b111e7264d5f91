"""SODA Mix: any number of adapters, from files and from other nodes, each with a weight, as one adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from comfy_api.latest import io

from ..soda.adapter import Adapter
from ..soda.file import load
from ..soda.hosts.comfy import folders, patch, status
from ..soda.mixing import mix
from .sockets import CATEGORY, ROLES, SODA_ADAPTER, strength_input

ROWS = 8


def row_id(number: int) -> str:
    """Rows count from 1. ComfyUI needs an id unlike its parent's, so the chain is row, row2, row3 ..."""
    return "row" if number == 1 else f"row{number}"


def row_input(number: int) -> io.DynamicCombo.Input:
    """A row: none, or a file, or a wired adapter, each with weight, role and the next row.

    Rows are chained rather than counted: adding one keeps the values of those before it in both frontends.
    """

    def filled(source: io.Input) -> list[io.Input]:
        inputs = [
            source,
            strength_input("weight", "How much of this adapter: 0 none, 1 as trained, negative turns the other way."),
            io.Combo.Input(
                "role",
                options=["auto", *ROLES],
                default="auto",
                tooltip="What the adapter is for; auto takes what its file says. Recorded in the mix.",
            ),
        ]
        return inputs if number == ROWS else [*inputs, row_input(number + 1)]

    return io.DynamicCombo.Input(
        row_id(number),
        options=[
            io.DynamicCombo.Option("none", []),
            io.DynamicCombo.Option(
                "file",
                filled(
                    io.Combo.Input("adapter_name", options=folders.adapter_names(), tooltip="An adapter file to mix.")
                ),
            ),
            io.DynamicCombo.Option(
                "wired",
                filled(SODA_ADAPTER.Input("adapter", tooltip="An adapter from SODA Train, Save, Loader or Mix.")),
            ),
        ],
        tooltip=f"Where adapter {number} comes from; none ends the list.",
    )


def filled_rows(row: dict) -> Iterator[dict]:
    """The values of every row before the first none, as ComfyUI nests them."""
    for number in range(1, ROWS + 1):
        if row[row_id(number)] == "none":
            return
        yield row
        if number < ROWS:
            row = row[row_id(number + 1)]


def adapter_of(row: dict) -> Adapter:
    """A row's adapter, with the role that the row gives it."""
    adapter = load(folders.resolve(row["adapter_name"])) if "adapter_name" in row else row["adapter"]
    if row["role"] == "auto":
        return adapter
    return replace(adapter, metadata={**adapter.metadata, "soda.role": row["role"]})


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
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Only needed for adapters that also change the text encoder.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the mix."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoder with the mix; empty if none was wired."),
                SODA_ADAPTER.Output(display_name="adapter", tooltip="The mix as one adapter, to save or to mix further."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, row: dict, **_) -> list[str]:
        return [folders.fingerprint(filled["adapter_name"]) for filled in filled_rows(row) if "adapter_name" in filled]

    @classmethod
    def execute(cls, model, row: dict, clip=None) -> io.NodeOutput:
        parts = [(adapter_of(filled), filled["weight"]) for filled in filled_rows(row)]
        new_model, new_clip, report = patch.apply(model, parts, clip)
        mixed = mix(parts, "mix")
        single, reason = mixed.is_single_form()
        if not single:
            report.warnings.append(f"This mix works but cannot be saved as one SODA file: {reason}")
        status.show(report.text(), cls.hidden.unique_id)
        return io.NodeOutput(new_model, new_clip, mixed)
