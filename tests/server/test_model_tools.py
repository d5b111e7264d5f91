"""What ComfyUI's model sidebar and preview, and tools that look beside a file, find of a saved adapter."""

import base64
import io
import json
import urllib.parse

import pytest
from PIL import Image
from prompts import Playground, Prompt

from runner.client import Refused

RED = 0xE01010


@pytest.fixture(scope="module")
def saved(client, adapters, subject) -> str:
    """An adapter saved with trigger words and a red picture -> its name among the LoRAs."""
    prompt = Prompt()
    playground = Playground(prompt)
    picture = (prompt.add("EmptyImage", width=700, height=350, batch_size=1, color=RED), 0)
    prompt.add(
        "SodaSave", adapter=(playground.load(subject), 2), filename_prefix="shown", trigger_words="sks monster, pom",
        thumbnail=picture,
    )  # fmt: skip
    client.run(prompt)
    return "soda/shown_00001_.safetensors"


def metadata(client, name: str) -> dict:
    return client.get_json(f"/view_metadata/loras?filename={urllib.parse.quote(name, safe='')}")


def preview(client, name: str) -> Image.Image:
    """What ComfyUI shows for one of the LoRAs."""
    (entry,) = [entry for entry in client.get_json("/experiment/models/loras") if entry["name"] == name]
    return Image.open(io.BytesIO(client.get(f"/experiment/models/preview/loras/{entry['pathIndex']}/{name}")))


def is_red(picture: Image.Image) -> bool:
    r, g, b = picture.convert("RGB").resize((1, 1)).getpixel((0, 0))
    return r > 200 and g < 60 and b < 60


def test_the_sidebar_gets_title_base_words_and_picture(client, saved):
    found = metadata(client, saved)
    assert found["modelspec.title"] == found["ss_output_name"] == "shown_00001_"
    assert found["modelspec.trigger_phrase"] == "sks monster, pom"
    assert found["modelspec.architecture"] == "soda-playground/soda" and found["ss_sd_model_name"] == "playground"
    assert set(found["modelspec.tags"].split(", ")) == {"soda", "subject"}
    head, _, data = found["modelspec.thumbnail"].partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/jpeg;base64" and picture.size == (256, 128) and is_red(picture)


def test_lora_tools_get_their_words(client, saved):
    """LoRA Manager and rgthree count the words of the first set in ss_tag_frequency."""
    (words,) = json.loads(metadata(client, saved)["ss_tag_frequency"]).values()
    assert set(words) == {"sks monster", "pom"}


def test_the_preview_is_beside_the_file_and_in_it(client, adapters, saved):
    beside = adapters / "shown_00001_.jpg"
    with Image.open(beside) as picture:
        assert picture.format == "JPEG" and picture.size == (512, 256)
    shown = preview(client, saved)
    assert is_red(shown) and shown.size == (512, 256)
    beside.unlink()
    alone = preview(client, saved)  # as of a file that somebody sent without its picture
    assert is_red(alone) and alone.size == (256, 128)


def test_an_adapter_without_a_picture_has_none(client, adapters, subject):
    assert not (adapters / subject).with_suffix(".jpg").exists()
    with pytest.raises(Refused, match="404"):
        preview(client, f"soda/{subject}")


def test_the_last_sample_of_a_training_is_the_picture(client, adapters):
    prompt = Prompt()
    playground = Playground(prompt)
    latents, positive = playground.drawings()
    trained = playground.train(
        positive, latents=latents, steps=2, seed=91, sample_prompt="sks monster", clip=playground.clip,
        vae=playground.vae,
    )  # fmt: skip
    playground.save((trained, 0), "sampled")
    client.run(prompt)
    with Image.open(adapters / "sampled_00001_.jpg") as picture:
        assert picture.size == (192, 192)  # of 64 px, three times as large
    assert "modelspec.thumbnail" in metadata(client, "soda/sampled_00001_.safetensors")
