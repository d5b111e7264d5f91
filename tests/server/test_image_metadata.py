"""Saved pictures name the adapters that made them, with hashes; also where everything came from the cache."""

import hashlib
import io
import json

from PIL import Image
from prompts import Playground, Prompt


def saved(client, model_of) -> tuple[list, dict]:
    """(what each of two queueings of a prompt wrote under "soda", the prompt); the second with another file name."""
    found = []
    for prefix in ("first", "second"):
        prompt = Prompt()
        playground = Playground(prompt)
        model = model_of(playground)
        latent = (prompt.add("EmptyLatentImage", width=32, height=32, batch_size=1), 0)
        text = playground.text()
        sampled = prompt.add(
            "KSampler", model=model, positive=text, negative=text, latent_image=latent, seed=1, steps=1, cfg=1.0,
            sampler_name="euler", scheduler="normal", denoise=1.0,
        )  # fmt: skip
        image = prompt.add("VAEDecode", samples=(sampled, 0), vae=playground.vae)
        node = prompt.add("SaveImage", images=(image, 0), filename_prefix=f"named_{prefix}")
        result = client.run(prompt)
        if prefix == "second":
            assert sampled in result.cached
        with Image.open(io.BytesIO(client.view(result.images(node)[0]))) as picture:
            assert set(json.loads(picture.text["prompt"])) == set(prompt)
            found.append(json.loads(picture.text["soda"]) if "soda" in picture.text else None)
    return found, prompt


def hashes(path) -> dict[str, str]:
    data = path.read_bytes()
    whole = hashlib.sha256(data).hexdigest()
    body = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    return {"SHA256": whole, "AutoV2": whole[:10], "AutoV3": body[:12]}


def test_a_picture_names_the_adapter_also_at_the_second_cached_queue(client, adapters, subject):
    (first, second), _ = saved(client, lambda playground: (playground.load(subject, 0.8), 0))
    (entry,) = first
    assert first == second
    assert {k: entry[k] for k in ("name", "weight", "role")} == {"name": subject, "weight": 0.8, "role": "subject"}
    assert entry["hashes"] == hashes(adapters / subject)
    header = json.loads((data := (adapters / subject).read_bytes())[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"]["sshs_model_hash"].startswith(entry["hashes"]["AutoV3"])


def test_a_mix_names_all_its_parts_with_their_weights(client, adapters, subject, style):
    def mixed(playground):
        loaded = playground.load(style, 0.3)  # only its adapter output is used, which its strength does not touch
        mix = playground.mix([(subject, 0.5), ("(wired)", 0.25)])
        playground.prompt[mix]["inputs"]["adapters.adapter0"] = [loaded, 2]
        return (mix, 0)

    (first, second), prompt = saved(client, mixed)
    assert first == second
    assert [(e["name"], e["weight"], e["role"]) for e in first] == [(subject, 0.5, "subject"), (style, 0.25, "style")]
    assert [e["hashes"] for e in first] == [hashes(adapters / name) for name in (subject, style)]
    assert {prompt[e["node"]]["class_type"] for e in first} == {"SodaMix"}


def test_a_soda_file_in_the_stock_loader_is_named_and_a_loader_that_is_not_used_is_not(client, adapters, subject):
    def stock(playground):
        playground.load(subject)
        inputs = {"model": playground.model, "lora_name": f"soda/{subject}", "strength_model": 0.5}
        return (playground.prompt.add("LoraLoaderModelOnly", **inputs), 0)

    (entry, *others), _ = saved(client, stock)[0]
    assert not others and (entry["name"], entry["weight"]) == (subject, 0.5)
    assert entry["hashes"] == hashes(adapters / subject)


def test_pictures_without_an_adapter_say_nothing(client, subject):
    assert saved(client, lambda playground: playground.model)[0] == [None, None]
    assert saved(client, lambda playground: (playground.load(subject, 0.0), 0))[0] == [None, None]
