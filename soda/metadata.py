"""What a SODA file says about itself, in the keys that this library and other tools read.

`soda.*` is our own; `modelspec.*` is Stability's ModelSpec 1.0 (ComfyUI's model sidebar, Forge); `ss_*` are kohya's
names (LoRA Manager, rgthree, the webuis). All values are strings, as safetensors wants them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping

FORMAT_VERSION = "1"
ROLES = ("subject", "style", "other")
# modelspec architecture of the base -> the base model version by which LoRA tools know it: LoRA Manager finds the
# first four by their beginnings, Forge SDXL's, and shows others as they are, hence by Civitai's names
BASE_VERSIONS = {
    "stable-diffusion-v1": "sd_1.5",
    "stable-diffusion-v2-512": "sd-v2",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
    "flux-1-dev": "flux1",
    "auraflow": "AuraFlow",
    "chroma": "Chroma",
    "hidream": "HiDream",
    "hunyuanvideo": "Hunyuan Video",
    "lumina2": "Lumina",
    "qwenimage": "Qwen",
    "sd3": "SD 3",
    "wan21_t2v": "Wan Video",
    "zimage": "ZImageBase",
}
THUMBNAIL = "data:image/jpeg;base64,"
PICTURES = ("modelspec.thumbnail", "ssmd_cover_images")  # as `with_thumbnail` writes them


def describe(
    *, title: str, role: str, architecture: str, base_model: str, base_hash: str, training: Mapping[str, object]
) -> dict[str, str]:
    """Metadata of a freshly trained adapter. `architecture` is modelspec's, `<base>/soda`; `base_hash` is
    `fingerprint.base_hash` of the adapted weights; `training` is kept as JSON. Raises ValueError for an unknown
    role."""
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}; known are {', '.join(ROLES)}")
    family = architecture.split("/")[0]
    return {
        "format": "pt",
        "soda.format_version": FORMAT_VERSION,
        "soda.role": role,
        "soda.base_model": base_model,
        "soda.base_hash": base_hash,
        "soda.training": json.dumps(training),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://arxiv.org/abs/2405.21050",
        "modelspec.title": title,
        "modelspec.tags": f"soda, {role}",
        "ss_network_module": "soda",
        "ss_base_model_version": BASE_VERSIONS.get(family, family),
        "ss_sd_model_name": base_model,
    }


def label(
    metadata: Mapping[str, str], *, title: str, trigger_words: str = "", thumbnail: bytes | None = None
) -> dict[str, str]:
    """`metadata` with what is known when a file is written: its title, its trigger words (separated by commas; empty
    keeps those it has) and a JPEG thumbnail (None keeps it as well)."""
    labelled = {"soda.format_version": FORMAT_VERSION, **metadata}
    labelled |= {"modelspec.title": title, "ss_output_name": title}
    words = [word for word in (w.strip() for w in trigger_words.split(",")) if word]
    if words:
        phrase = ", ".join(words)
        labelled["modelspec.trigger_phrase"] = phrase
        labelled["modelspec.usage_hint"] = f"Write {phrase} in the prompt; 1.0 is the trained strength."
        labelled["ss_tag_frequency"] = json.dumps({"1_" + words[0]: dict.fromkeys(words, 1)})
    return labelled if thumbnail is None else with_thumbnail(labelled, thumbnail)


def with_thumbnail(metadata: Mapping[str, str], jpeg: bytes) -> dict[str, str]:
    """`metadata` with a picture where ComfyUI's model sidebar looks (modelspec) and where its preview of model files
    and Forge do (ssmd_cover_images, a JSON list)."""
    encoded = base64.b64encode(jpeg).decode()
    return {**metadata, "modelspec.thumbnail": THUMBNAIL + encoded, "ssmd_cover_images": json.dumps([encoded])}


def thumbnail_of(metadata: Mapping[str, str]) -> bytes | None:
    """The JPEG in `metadata`; None where there is none."""
    kept = metadata.get("modelspec.thumbnail", "")
    return base64.b64decode(kept.removeprefix(THUMBNAIL)) if kept.startswith(THUMBNAIL) else None
