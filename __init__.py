"""ComfyUI-SODA: spectral orthogonal adapters for diffusion models, as a ComfyUI node pack."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI: the pack's extension object."""
    from .nodes import SodaExtension

    return SodaExtension()
