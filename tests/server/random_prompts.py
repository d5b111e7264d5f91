"""Prompts as many users would queue them one after the other, drawn at random, and the files that they name.

Each puts zero to three nodes on the playground's model or on a fine-tune of it: SODA files through SODA Loader, SODA
Mix, SODA Stack and ComfyUI's own LoRA loaders, ordinary LoRAs before and after, merged or in bypass, at changing
strengths; then samples one or two steps.
"""

import os
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from device import ARGUMENTS
from prompts import Playground, Prompt
from safetensors import safe_open
from safetensors.torch import save_file

from runner.server import Server
from soda.adapter import DECOMPOSITIONS, Adapter, Decomposition, Layer
from soda.decomposition import decompose, spectral_sketch
from soda.file import save
from soda.kronecker import factor_sizes

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "playground" / "model.safetensors"
SHIPPED = [f"soda_{role}.safetensors" for role in ("subject", "style")]
OTHER_MODEL = '''
import sys, folder_paths

class OtherModel:
    """The playground's classes with another file's weights."""
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP"), "load", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def load(self):
        host = next(m for name, m in sys.modules.items() if name.endswith(".soda.hosts.comfy.playground"))
        path = folder_paths.get_full_path_or_raise("checkpoints", "fine_tune.safetensors")
        return host.load_model(path), host.load_clip(path)

NODE_CLASS_MAPPINGS = {"OtherModel": OtherModel}
'''
PLACES = {"model.diffusion_model.": "diffusion_model.", "cond_stage_model.": "clip_l."}  # in the checkpoint: in a file
STRENGTHS = (-1.0, -0.4, 0.0, 0.3, 0.7, 1.0, 1.5)
KEEP_NOTHING = '{"SODA.basesInMemory": 0, "SODA.basesOnDisk": 0}'


class PreparedServer(Server):
    """A server with the random prompts' files in its folders, and the user's settings if they are not the default."""

    def __init__(self, log: Path, *arguments: str, settings: str | None = None) -> None:
        super().__init__(
            Path(os.environ["COMFYUI_PATH"]), sys.executable, ROOT, arguments=(*ARGUMENTS, *arguments), log=log
        )
        self.settings = settings

    def _stage(self) -> None:
        super()._stage()
        make_files(self.base)
        if self.settings is not None:
            (self.base / "user" / "default").mkdir()
            (self.base / "user" / "default" / "comfy.settings.json").write_text(self.settings)


def usage(server: Server) -> tuple[float, int]:
    """Memory of the server's process in MiB, and its open files."""
    process = psutil.Process(server.process.pid)
    files = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
    return process.memory_info().rss / 2**20, files


def attention(kind: str) -> dict[str, torch.Tensor]:
    """Layer -> weight (out, in) of the playground's attention, of the text encoder's where `kind` says so."""
    found = {}
    with safe_open(MODEL, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            place = next((p for p in PLACES if key.startswith(p)), "")
            part = "self_attn" if kind == "text" else ".attn"
            if place and part in key and key.endswith("weight") and (kind == "text") == (place == "cond_stage_model."):
                weight = file.get_tensor(key).float()
                found[PLACES[place] + key[len(place) : -len(".weight")]] = weight.flatten(1)
    return found


def random_adapter(weights: dict[str, torch.Tensor], decomposition: Decomposition, seed: int) -> Adapter:
    """With true sketches, so that loaders see on which base they are."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int, size: float) -> torch.Tensor:
        return torch.randn(count, generator=generator) * size

    layers = {}
    for name, weight in weights.items():
        width = weight.shape[0 if decomposition == "qr" else 1]
        logs = tuple(normal(n * (n - 1) // 2, 0.05) for n in factor_sizes(width, 3))
        layer = Layer(decomposition, None, logs)
        basis = decompose(weight, decomposition)
        if basis is not None:
            delta = normal(min(weight.shape), 0.1) * basis.spectrum.abs()  # small beside it: svd's stays above -sigma
            layer = replace(layer, delta=delta, sketch=spectral_sketch(basis, delta))
        layers[name] = (layer,)
    return Adapter(layers, {"soda.role": "style"})


def make_files(base: Path) -> None:
    """Adapters of every form, one with a text encoder's part, LoRAs, and the fine-tune with the node that loads it."""
    for folder in ("loras/soda", "checkpoints"):
        (base / "models" / folder).mkdir(parents=True)
    unet, text = attention("unet"), attention("text")
    loras = base / "models" / "loras"
    for seed, decomposition in enumerate(DECOMPOSITIONS):
        # Each on other layers, so that mixes overlap in part.
        some = {name: unet[name] for name in sorted(unet)[seed :: 2 + seed]}
        save(random_adapter(some, decomposition, seed), loras / "soda" / f"{decomposition}.safetensors")
    save(random_adapter({**unet, **text}, "lq", 9), loras / "soda" / "text.safetensors")
    for seed in range(2):
        generator = torch.Generator().manual_seed(20 + seed)
        lora = {}
        for name, weight in unet.items():
            lora[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 4, generator=generator) * 0.03
            lora[f"{name}.lora_down.weight"] = torch.randn(4, weight.shape[1], generator=generator) * 0.3
        save_file(lora, loras / f"lora{seed}.safetensors")
    generator = torch.Generator().manual_seed(30)
    with safe_open(MODEL, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for key, tensor in tensors.items():
        if key.startswith("model.") and tensor.ndim > 1:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * 0.02
            tensors[key] = (tensor.float() + noise).to(tensor.dtype)
    save_file(tensors, base / "models" / "checkpoints" / "fine_tune.safetensors", metadata)
    (base / "custom_nodes" / "other_model.py").write_text(OTHER_MODEL)


@dataclass(frozen=True)
class Drawn:
    """A prompt, the id of the node that saves its latent, and what it does in a few words."""

    prompt: Prompt
    node: str
    about: str


def draw(chance: random.Random, plain: bool = False) -> Drawn:
    """The next prompt; a `plain` one has ordinary LoRAs in all places."""
    return _Drawing(chance, plain).sampled()


class _Drawing:
    def __init__(self, chance: random.Random, plain: bool) -> None:
        self.chance = chance
        self.plain = plain
        self.prompt = Prompt()
        self.on = Playground(self.prompt)
        self.words: list[str] = []
        if chance.random() < 0.3:
            other = self.prompt.add("OtherModel")
            self.on.model, self.on.clip = (other, 0), (other, 1)
            self.words.append("fine-tune")
        self.model, self.clip = self.on.model, self.on.clip

    def sampled(self) -> Drawn:
        steps = (self.loader, self.mix, self.lora, self.lora, self.stock, self.beside)
        if self.plain:
            steps = (self.lora,) * len(steps)
        for step in self.chance.choices(steps, k=self.chance.randint(0, 3)):
            self.words.append(step.__name__)
            step()
        positive, negative = (
            (self.prompt.add("CLIPTextEncode", text=text, clip=self.clip), 0)
            for text in (self.chance.choice(("sks monster", "a red circle on a blue background")), "")
        )
        latent = (self.prompt.add("EmptyLatentImage", width=64, height=64, batch_size=1), 0)
        sampled = self.prompt.add(
            "KSampler", model=self.model, positive=positive, negative=negative, latent_image=latent,
            seed=self.chance.randrange(1000), steps=self.chance.randint(1, 2), cfg=1.0, sampler_name="euler",
            scheduler="normal", denoise=1.0,
        )  # fmt: skip
        saved = self.prompt.add("SaveLatent", samples=(sampled, 0), filename_prefix="latents/random")
        return Drawn(self.prompt, saved, " ".join(self.words) or "base")

    def file(self) -> str:
        return self.chance.choice([*SHIPPED, *(f"{d}.safetensors" for d in DECOMPOSITIONS), "text.safetensors"])

    def strength(self) -> float:
        return self.chance.choice(STRENGTHS)

    def mode(self) -> str:
        return self.chance.choice(("auto", "auto", "merge", "bypass"))

    def loader(self) -> None:
        node = self.on.load(self.file(), self.strength(), self.model)
        self.prompt[node]["inputs"]["mode"] = self.mode()
        self.with_clip(node, strength_clip=self.strength())

    def mix(self) -> None:
        parts = [(self.file(), self.strength()) for _ in range(self.chance.randint(1, 5))]
        node = self.on.mix(parts, self.model)
        inputs = self.prompt[node]["inputs"]
        inputs["mode"] = self.mode()
        if self.chance.random() < 0.3:
            inputs["adapters.adapter0"] = [self.on.load(self.file(), 0.0), 2]
        if self.chance.random() < 0.3:
            inputs["lora_stack"] = [self.stack(), 0]
        self.with_clip(node)

    def stack(self) -> str:
        values = {"strength": self.strength(), "strength_clip": self.strength()}
        node = self.prompt.add("SodaStack", adapter_name=self.loras_file(), **values)
        if self.chance.random() < 0.5:
            node = self.prompt.add("SodaStack", adapter_name=self.loras_file(), lora_stack=(node, 0), **values)
        return node

    def loras_file(self) -> str:
        return f"{self.chance.choice([*DECOMPOSITIONS, 'text'])}.safetensors"

    def lora(self) -> None:
        self.through("LoraLoader", f"lora{self.chance.randrange(2)}.safetensors")

    def stock(self) -> None:
        self.through("LoraLoader", f"soda/{self.loras_file()}")

    def beside(self) -> None:
        """Core's bypass refuses qr with a sentence; hence the others."""
        name = self.chance.choice(("lora0", "soda/lq", "soda/svd", "soda/none"))
        self.through("LoraLoaderBypass", f"{name}.safetensors")

    def through(self, loader: str, name: str) -> None:
        values = {"strength_model": self.strength(), "strength_clip": self.strength()}
        node = self.prompt.add(loader, model=self.model, clip=self.clip, lora_name=name, **values)
        self.model, self.clip = (node, 0), (node, 1)

    def with_clip(self, node: str, **values: float) -> None:
        """Half of the users wire the text encoder too."""
        self.model = (node, 0)
        if self.chance.random() < 0.5:
            self.prompt[node]["inputs"] |= {"clip": list(self.clip), **values}
            self.clip = (node, 1)
