"""The nodes as ComfyUI calls them: schemas, rows, files, the counter, metadata."""

from __future__ import annotations

import asyncio
import dataclasses
import os

import folder_paths
import pytest
import torch
from comfy_api.latest._io import build_nested_inputs, get_finalized_class_inputs
from safetensors import safe_open
from small_models import adapter, conditioning, latents, load, same, small_model, weights
from soda_pack import comfy_entrypoint
from soda_pack.nodes.loader import SodaLoader
from soda_pack.nodes.mix import WIRED, SodaMix
from soda_pack.nodes.save import SodaSave
from soda_pack.nodes.train import SodaTrain
from soda_pack.soda.errors import SodaError, SodaFileError, SodaMixError, SodaTrainingError
from soda_pack.soda.hosts.comfy import folders
from soda_pack.soda.hosts.comfy.patch import apply
from soda_pack.soda.mixing import mix


def run(node, **inputs):
    """Execute a node as the server does: on a clone of its class that carries the hidden inputs."""
    cls = node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    with torch.inference_mode():
        return cls.execute(**inputs)


def rows(*entries):
    """The nested value of SODA Mix's rows: the values of each filled row, then none."""
    ids = ["row", *(f"row{number}" for number in range(2, 9))]
    value = {ids[len(entries)]: "none"}
    for index in range(len(entries) - 1, -1, -1):
        value = {ids[index]: "adapter", ids[index + 1]: value, "role": "auto", **entries[index]}
    return value


def test_the_entrypoint_lists_the_nodes_and_their_schemas_are_valid():
    extension = asyncio.run(comfy_entrypoint())
    asyncio.run(extension.on_load())
    nodes = asyncio.run(extension.get_node_list())
    assert {"SodaLoader", "SodaMix", "SodaTrain", "SodaSave"} <= {node.__name__ for node in nodes}
    for node in nodes:
        schema = node.GET_SCHEMA()
        assert schema.node_id == node.__name__ and schema.category == "SODA" and schema.description
        for one in schema.inputs:
            assert one.tooltip, (schema.node_id, one.id)


def test_save_counts_up_and_load_gives_the_same_adapter(output):
    model = small_model()
    one = adapter(model, name="mine")
    first = run(SodaSave, adapter=one, filename_prefix="cat", trigger_words="sks", thumbnail=None)
    second = run(SodaSave, adapter=one, filename_prefix="cat", trigger_words="", thumbnail=None)
    names = sorted(os.listdir(output / "loras" / "soda"))
    assert names == ["cat_00001_.safetensors", "cat_00002_.safetensors"]
    assert set(names) <= set(folders.adapter_names())
    assert first[0].content_hash == one.content_hash == second[0].content_hash
    loaded = run(SodaLoader, model=model, adapter_name=names[0], strength=1.0)
    assert loaded[2].content_hash == one.content_hash and loaded[1] is None
    expected = apply(model, [(one, 1.0)])[0]
    load(loaded[0])
    after = weights(loaded[0])
    load(expected)
    assert same(after, weights(expected))


def test_saved_metadata_is_what_other_tools_read(output):
    one = adapter(small_model())
    picture = torch.rand(1, 300, 500, 3)
    run(SodaSave, adapter=one, filename_prefix="a/b", trigger_words="sks, creature", thumbnail=picture)
    path, beside = sorted((output / "loras" / "soda" / "a").iterdir(), key=lambda found: found.suffix, reverse=True)
    assert beside.name == "b_00001_.jpg"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert path.name == "b_00001_.safetensors" and metadata["modelspec.title"] == "b_00001_"
    assert metadata["modelspec.trigger_phrase"] == "sks, creature" and metadata["soda.role"] == "style"
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert len(metadata["modelspec.thumbnail"]) < 60_000


def test_names_from_a_prompt_stay_inside_the_folders(output):
    (output / "secret.safetensors").write_bytes(b"x")
    for name in ["../../secret.safetensors", "/etc/passwd", "absent.safetensors"]:
        with pytest.raises(SodaFileError, match="There is no SODA adapter named"):
            folders.resolve(name)
    with pytest.raises(Exception, match="outside the output folder"):
        folders.next_save_path("../../evil")


def test_a_broken_file_is_named(output):
    folder = output / "loras" / "soda"
    folder.mkdir(parents=True)
    (folder / "bad.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(SodaFileError, match="bad.safetensors"):
        run(SodaLoader, model=small_model(), adapter_name="bad.safetensors", strength=1.0)


def test_a_replaced_file_changes_the_fingerprint(output):
    model = small_model()
    run(SodaSave, adapter=adapter(model), filename_prefix="x", trigger_words="", thumbnail=None)
    name = "x_00001_.safetensors"
    before = SodaLoader.fingerprint_inputs(adapter_name=name, strength=1.0)
    assert before == SodaLoader.fingerprint_inputs(adapter_name=name, strength=0.5)
    path = folder_paths.get_full_path("soda", name)
    os.utime(path, ns=(1, 1))
    assert before != SodaLoader.fingerprint_inputs(adapter_name=name, strength=1.0)
    mixed = rows({"adapter_name": name, "weight": 1.0})
    assert SodaMix.fingerprint_inputs(row=mixed) == [SodaLoader.fingerprint_inputs(adapter_name=name)]


def test_mix_takes_files_and_wires(output):
    model = small_model()
    a, b = adapter(model, 1, name="a"), adapter(model, 2, name="b")
    run(SodaSave, adapter=a, filename_prefix="a", trigger_words="", thumbnail=None)
    chain = rows(
        {"adapter_name": WIRED, "weight": 0.5},
        {"adapter_name": "a_00001_.safetensors", "weight": 0.75, "role": "subject"},
    )
    patched, clip, mixed = run(SodaMix, model=model, row=chain, adapters={"adapter3": b}).args
    assert clip is None and mixed.content_hash == mix([(b, 0.5), (a, 0.75)]).content_hash
    expected = apply(model, [(b, 0.5), (a, 0.75)])[0]
    load(patched)
    after = weights(patched)
    load(expected)
    assert same(after, weights(expected))
    unweighed = run(SodaMix, model=model, row=rows(), adapters={"adapter0": b})
    assert unweighed[2].content_hash == b.content_hash
    with pytest.raises(SodaMixError, match="no adapter"):
        run(SodaMix, model=model, row=rows())
    with pytest.raises(SodaMixError, match="more .wired. rows"):
        run(SodaMix, model=model, row=chain, adapters={})


def test_mix_rows_expand_as_the_server_expands_them():
    live = {
        "row": "adapter", "row.adapter_name": WIRED, "row.weight": 1.0, "row.role": "auto", "adapters.adapter0": 7,
        "row.row2": "adapter", "row.row2.adapter_name": "x", "row.row2.weight": 2.0, "row.row2.role": "style",
        "row.row2.row3": "none",
    }  # fmt: skip
    _, _, v3 = get_finalized_class_inputs(SodaMix.INPUT_TYPES(), live)
    nested = build_nested_inputs(live, v3)
    row = nested["row"]
    assert nested["adapters"] == {"adapter0": 7}
    assert row["row"] == row["row2"]["row2"] == "adapter" and row["row2"]["weight"] == 2.0
    assert row["row2"]["row3"]["row3"] == "none"


def test_unlike_factor_sizes_mix_but_cannot_be_saved(output):
    model = small_model()
    a, b = adapter(model, 1, name="a"), adapter(model, 2, factors=2, name="b")
    patched, _, mixed = run(SodaMix, model=model, row=rows(), adapters={"adapter0": a, "adapter1": b}).args
    base = weights(model)
    load(patched)
    assert not same(base, weights(patched))
    with pytest.raises(SodaError):
        run(SodaSave, adapter=mixed, filename_prefix="m", trigger_words="", thumbnail=None)
    assert not list((output / "loras" / "soda").glob("*"))


def train(**changes):
    inputs = {
        "model": [small_model()], "positive": [conditioning()], "latents": [latents(2)], "steps": [3],
        "learning_rate": [0.01], "batch_size": [2], "seed": [2**64 - 1], "decomposition": ["lq"], "factors": [3],
        "role": ["subject"], "targets": ["all attention"],
    }  # fmt: skip
    return run(SodaTrain, **{**inputs, **changes})


def test_train_gives_what_the_graph_needs():
    trained, loss_map, steps = train().args
    assert steps == 3 and len(loss_map["loss"]) == 3 and trained.role == "subject"
    assert dataclasses.is_dataclass(trained)


def test_train_needs_latents_or_images_and_all_for_a_sample():
    with pytest.raises(SodaTrainingError, match="wire latents, or images"):
        train(latents=None)
    with pytest.raises(SodaTrainingError, match="needs a clip and a vae"):
        train(sample_prompt=["a cat"])
