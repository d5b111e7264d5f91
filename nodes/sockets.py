"""What several nodes share: the sockets, the category, the strength widget's range."""

from comfy_api.latest import io

from ..soda import metadata
from ..soda.hosts.comfy.patch import MODES

CATEGORY = "SODA"
SODA_ADAPTER = io.Custom("SODA_ADAPTER")
LORA_STACK = io.Custom("LORA_STACK")  # of Efficiency Nodes, Comfyroll, LoRA Manager ...
SODA_TRAIN_OPTIONS = io.Custom("SODA_TRAIN_OPTIONS")
ROLES = list(metadata.ROLES)


def strength_input(name: str, tooltip: str, optional: bool = False) -> io.Float.Input:
    """A weight from -10 to 10; 0 changes nothing, 1 is the adapter as trained, negative turns the other way."""
    return io.Float.Input(name, default=1.0, min=-10.0, max=10.0, step=0.05, optional=optional, tooltip=tooltip)


def mode_input() -> io.Combo.Input:
    return io.Combo.Input(
        "mode",
        options=list(MODES),
        default="auto",
        optional=True,
        advanced=True,
        tooltip="merge: into the weights, costs nothing while sampling. bypass: beside them, which is exact where "
        "they are quantised (fp8, int8, GGUF ...). auto: bypass where they are quantised, else merge.",
    )
