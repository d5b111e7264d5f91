"""What tests need of a server that no node of ComfyUI gives; staged among its custom nodes."""

import copy
import hashlib

import comfy.model_management
import torch


class StoredBytes:
    """SHA-256 over all weights of a model and its text encoder as they are stored, with no patch loaded.

    But for CLIP's text projection, which the playground has not: a new model holds there what memory held.
    """

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "digest", "tests", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",), "latent": ("LATENT",), "salt": ("STRING",)}}

    def digest(self, model, clip, latent, salt):
        comfy.model_management.unload_all_models()
        found = hashlib.sha256()
        for network in (model.model, clip.cond_stage_model):
            for name, tensor in network.state_dict().items():
                if name.endswith("text_projection.weight"):
                    continue
                found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return {"ui": {"text": (found.hexdigest(),)}}


class HugeVAE:
    """A VAE that says it needs more memory to decode than any computer has."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "huge", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",)}}

    def huge(self, vae):
        vae = copy.copy(vae)
        vae.memory_used_decode = lambda shape, dtype: 2.0**60
        return (vae,)


class LittleMemory:
    """Latents unchanged; from here on torch may take `room` MiB more of the GPU than it holds, or all with 0."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = ("LATENT",), "limit", "tests", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latents": ("LATENT",), "room": ("INT", {"default": 0, "max": 2**20})}}

    def limit(self, latents, room):
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        _, total = torch.cuda.mem_get_info()
        allowed = torch.cuda.memory_reserved() + room * 2**20
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total) if room else 1.0)
        return (latents,)


class FailsOnce:
    """The model with a network that gives NaN in one forward pass, the one of number `at`."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "patch", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "at": ("INT", {"default": 1})}}

    def patch(self, model, at):
        passes = 0

        def failing(h, options):
            nonlocal passes
            if options["block"] != ("input", 1):
                return h
            passes += 1
            return h * float("nan") if passes == at else h

        model = model.clone()
        model.set_model_input_block_patch(failing)
        return (model,)


NODES = (StoredBytes, HugeVAE, LittleMemory, FailsOnce)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
