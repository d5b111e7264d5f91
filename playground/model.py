"""The playground model outside a host: ComfyUI's modules, walked by `forward`, with a reduced token embedding.

Used to train it and to compare adaptations on it. Needs ComfyUI on the Python path.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import comfy.options

comfy.options.enable_args_parsing(False)

import comfy.cli_args  # noqa: E402
import torch  # noqa: E402

comfy.cli_args.args.cpu = not torch.cuda.is_available()

import comfy.clip_model  # noqa: E402
import comfy.ops  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from .architecture import TEXT, UNET  # noqa: E402
from .forward import Walk, encode_text  # noqa: E402

CHECKPOINT = Path(__file__).parent / "model.safetensors"
START, END, LENGTH = 49406, 49407, 77
WORDS: dict[str, list[int]] = json.loads((Path(__file__).parent / "vocabulary.json").read_text())
TOKEN_IDS = sorted({i for ids in WORDS.values() for i in ids} | {START, END})
ROW = {token: row for row, token in enumerate(TOKEN_IDS)}


def tokens(text: str) -> list[int]:
    """Rows of the reduced embedding for a caption, padded as ComfyUI's SD1 tokenizer pads."""
    ids = [START, *(i for word in re.findall(r"[a-z]+|,", text) for i in WORDS[word]), END]
    return [ROW[i] for i in ids + [END] * (LENGTH - len(ids))]


class Playground(nn.Module):
    """ComfyUI's UNet and CLIP text model with a reduced token embedding, initialised for training."""

    def __init__(self):
        super().__init__()
        made = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
        self.unet = UNetModel(**UNET, **made)
        self.text = comfy.clip_model.CLIPTextModel(TEXT, **made)
        self.text.text_model.embeddings.token_embedding = nn.Identity()
        self.words = nn.Embedding(len(TOKEN_IDS), TEXT["hidden_size"])
        for module in self.modules():
            base = next((kind for kind in (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.Embedding)
                         if isinstance(module, kind)), None)  # fmt: skip
            if base:
                base.reset_parameters(module)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.text.text_model.embeddings.position_embedding.weight, std=0.01)
        for name, module in self.unet.named_modules():
            if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

        self.walk = Walk(self.unet)

    def encode(self, rows: Tensor) -> Tensor:
        return encode_text(self.text.text_model, self.words(rows), TEXT["num_attention_heads"])

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The velocity at `(x, t)`."""
        return self.walk(x, t, context)


def sample(model: Playground, texts: list[str], seed: int, steps: int = 20, cfg: float = 3.0) -> Tensor:
    """Euler from noise to pictures in [0, 1] with classifier-free guidance."""
    device = model.words.weight.device
    context = model.encode(torch.tensor([tokens(text) for text in texts + [""] * len(texts)], device=device))
    x = torch.randn(len(texts), 3, 64, 64, generator=torch.Generator().manual_seed(seed)).to(device)
    times = torch.linspace(1, 0, steps + 1)
    for now, after in zip(times, times[1:], strict=False):
        v = model(torch.cat([x, x]), now.expand(2 * len(x)).to(device), context).float()
        told, untold = v.chunk(2)
        x = x + (after - now) * (untold + cfg * (told - untold))
    return (x / 2 + 0.5).clamp(0, 1)


def checkpoint_names(own: dict[str, Tensor]) -> dict[str, str]:
    """Parameter names of `Playground` -> Stable Diffusion 1's checkpoint names; the unused projection has none."""
    text = "cond_stage_model.transformer."
    names = {"words.weight": text + "text_model.embeddings.token_embedding.weight"}
    for key in own:
        if key.startswith("unet."):
            names[key] = "model.diffusion_model." + key[5:]
        elif key.startswith("text.text_model."):
            names[key] = text + key[5:]
    return names


def checkpoint(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors, fp16, with the token ids of the embedding's rows."""
    tensors = {name: own[key].half().contiguous().cpu() for key, name in checkpoint_names(own).items()}
    return tensors | {"token_ids": torch.tensor(TOKEN_IDS, dtype=torch.int32)}


def load(path: Path = CHECKPOINT) -> Playground:
    """The shipped model, fp32 on the CPU, frozen."""
    tensors, model = load_file(path), Playground()
    own = model.state_dict()
    own.update({named: tensors[key].float() for named, key in checkpoint_names(own).items()})
    model.load_state_dict(own)
    return model.eval().requires_grad_(False)
