"""The nodes of the pack, one file per job. They hold no maths: that is the library's."""

from comfy_api.latest import ComfyExtension, io

from ..soda.hosts.comfy import folders, routes, stock
from . import image_metadata
from .convert import SodaConvert, SodaTransport
from .loader import SodaLoader
from .mix import SodaMix
from .playground import SodaPlayground, SodaPlaygroundDrawings
from .save import SodaSave
from .stack import SodaStack
from .train import SodaTrain
from .train_options import SodaTrainOptions

NODES: list[type[io.ComfyNode]] = [
    SodaLoader,
    SodaMix,
    SodaStack,
    SodaTrain,
    SodaTrainOptions,
    SodaSave,
    SodaConvert,
    SodaTransport,
    SodaPlayground,
    SodaPlaygroundDrawings,
]


class SodaExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def on_load(self) -> None:
        folders.register()
        stock.register()
        routes.register()
        image_metadata.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
