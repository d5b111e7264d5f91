"""Format 1: what is written, what is read back, and how a file that is wrong is refused."""

import hashlib
import json
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from soda.adapter import Adapter, Layer
from soda.errors import SodaFileError
from soda.file import load, save, validate
from soda.kronecker import factor_sizes
from soda.metadata import describe, label
from soda.mixing import mix
from soda.summary import as_json

ROOT = Path(__file__).resolve().parents[2]
KINDS = ["lq", "svd", "qr", "none"]


def layer(kind="lq", dimension=24, k=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    logs = tuple(0.1 * torch.randn(n * (n - 1) // 2, generator=g) for n in factor_sizes(dimension, 3))
    if kind == "none":
        return Layer(kind, None, logs)
    return Layer(kind, torch.randn(k, generator=g), logs, torch.randn(8, 8, generator=g))


def metadata(**changes):
    values = {"title": "t", "role": "style", "architecture": "stable-diffusion-xl-v1-base/soda", "base_model": "base",
              "base_hash": "0" * 64, "training": {"steps": 3}, **changes}  # fmt: skip
    return describe(**values)


def adapter(**layers):
    return Adapter({k: (v,) for k, v in (layers or {"x.to_q": layer()}).items()}, metadata(), "one")


def sdxl():
    """The 560 attention matrices of SDXL: names, widths and spectra as they are there."""
    found, blocks = {}, []
    for place, width, depth in (("input_blocks.4.1", 640, 2), ("input_blocks.5.1", 640, 2),
                                ("input_blocks.7.1", 1280, 10), ("input_blocks.8.1", 1280, 10),
                                ("middle_block.1", 1280, 10), ("output_blocks.0.1", 1280, 10),
                                ("output_blocks.1.1", 1280, 10),
                                ("output_blocks.2.1", 1280, 10), ("output_blocks.3.1", 640, 2),
                                ("output_blocks.4.1", 640, 2), ("output_blocks.5.1", 640, 2)):  # fmt: skip
        blocks += [(f"diffusion_model.{place}.transformer_blocks.{i}", width) for i in range(depth)]
    for block, width in blocks:
        for attention, inner in (("attn1", width), ("attn2", 2048)):
            for name, inputs in (("to_q", width), ("to_k", inner), ("to_v", inner), ("to_out.0", width)):
                found[f"{block}.{attention}.{name}"] = (layer("lq", inputs, width),)
    assert len(found) == 560
    return Adapter(found, metadata(), "sdxl")


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_exact(tmp_path, kind):
    one = Adapter({"b.to_k[24:48]": (layer(kind),), "a": (layer(kind, 7, 7, 1),)}, metadata(), "x")
    save(one, tmp_path / "my adapter.safetensors")
    again = load(tmp_path / "my adapter.safetensors")
    assert again.content_hash == one.content_hash and again.name == "my adapter" and again.role == "style"
    assert one.metadata.items() <= again.metadata.items()
    for name, (term,) in one.layers.items():
        (found,) = again.layers[name]
        assert found.decomposition == kind and found.sizes == term.sizes
        assert found.sketch is None if kind == "none" else torch.equal(found.sketch, term.sketch)
    assert validate(tmp_path / "my adapter.safetensors") == (True, "")


def test_names_in_the_file(tmp_path):
    save(adapter(**{"x.to_q": layer("svd"), "y": layer("none")}), tmp_path / "f.safetensors")
    assert set(load_file(tmp_path / "f.safetensors")) == {
        "x.to_q.soda_svd", "x.to_q.soda_log_R0", "x.to_q.soda_log_R1", "x.to_q.soda_log_R2", "x.to_q.soda_sketch",
        "y.soda_log_R0", "y.soda_log_R1", "y.soda_log_R2",
    }  # fmt: skip


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5.0e6), (torch.float16, 2.9e6)])
def test_an_sdxl_adapter_is_small(tmp_path, dtype, limit):
    save(sdxl(), tmp_path / "f.safetensors", dtype)
    data = (tmp_path / "f.safetensors").read_bytes()
    assert len(data) <= limit and struct.unpack("<Q", data[:8])[0] < 1 << 20
    assert len(load(tmp_path / "f.safetensors").layers) == 560


def test_layers_may_share_their_tensors(tmp_path):
    shared = layer()
    save(adapter(x=shared, y=shared, z=layer(seed=1)), tmp_path / "f.safetensors")
    x, y, z = (term for (term,) in load(tmp_path / "f.safetensors").layers.values())
    assert torch.equal(x.delta, shared.delta) and torch.equal(y.logs[1], shared.logs[1]) and not z.delta.equal(x.delta)


def test_half_precision_is_read_as_fp32(tmp_path):
    one = adapter()
    save(one, tmp_path / "f.safetensors", torch.bfloat16)
    (found,), (term,) = load(tmp_path / "f.safetensors").layers["x.to_q"], one.layers["x.to_q"]
    assert found.delta.dtype == torch.float32 and torch.equal(found.delta, term.delta.bfloat16().float())


def test_headers_of_every_length(tmp_path):
    """The header's length comes first in the file, and none of them may pass for something else."""
    for extra in range(0, 256, 8):
        one = adapter()
        one.metadata["x"] = "." * extra
        save(one, tmp_path / "f.safetensors")
        assert load(tmp_path / "f.safetensors").content_hash == one.content_hash


def test_hashes_are_of_the_tensor_data(tmp_path):
    save(adapter(), tmp_path / "f.safetensors")
    data = (tmp_path / "f.safetensors").read_bytes()
    digest = hashlib.sha256(data[8 + struct.unpack("<Q", data[:8])[0] :]).hexdigest()
    found = load(tmp_path / "f.safetensors").metadata
    assert found["sshs_model_hash"] == digest and found["modelspec.hash_sha256"] == "0x" + digest


def test_metadata_of_other_tools():
    data = label(metadata(), title="cat", trigger_words="sks, fluffy", thumbnail=b"\xff\xd8jpeg")
    assert data["modelspec.title"] == data["ss_output_name"] == "cat"
    assert data["modelspec.trigger_phrase"] == "sks, fluffy" and "sks" in json.loads(data["ss_tag_frequency"])["1_sks"]
    assert data["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert json.loads(data["soda.training"]) == {"steps": 3} and data["soda.role"] == "style"
    with pytest.raises(ValueError, match="'villain'"):
        metadata(role="villain")


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (Adapter({}, {}), "no layer"),
        (Adapter({"x": (layer(), layer("svd"))}, {}), "'x' mixes"),
        (Adapter({"x": (layer().scaled(float("nan")),)}, {}), "x.soda_.*NaN"),
        (Adapter({"x": (layer(),)}, {"modelspec.thumbnail": "x" * (1 << 20)}), "header"),
    ],
)
def test_what_cannot_be_saved_leaves_the_old_file(tmp_path, one, message):
    path = tmp_path / "f.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(SodaFileError, match=message):
        save(one, path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f.safetensors"]


def test_numbers_too_large_for_fp16(tmp_path):
    large = replace(layer(), delta=torch.full((24,), 1e5))
    with pytest.raises(SodaFileError, match="x.soda_lq.*float16.*fp32"):
        save(Adapter({"x": (large,)}, {}), tmp_path / "f.safetensors", torch.float16)


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "f.safetensors").mkdir()
    with pytest.raises(SodaFileError, match="f.safetensors"):
        save(adapter(), tmp_path / "f.safetensors")
    assert os.listdir(tmp_path) == ["f.safetensors"] and not validate(tmp_path / "f.safetensors")[0]


def good_tensors():
    return {f"x.to_q.soda_log_R{j}": log for j, log in enumerate(layer().logs)} | {
        "x.to_q.soda_lq": layer().delta, "x.to_q.soda_sketch": layer().sketch,
    }  # fmt: skip


def without(*names):
    return {name: tensor for name, tensor in good_tensors().items() if name not in names}


NAN = torch.full((24,), float("nan"))
WRONG = {
    "lora": ({"a.lora_up.weight": torch.zeros(4, 2)}, "a.lora_up.weight.*LoRA"),
    "lora with alpha": ({"a.alpha": torch.ones(()), "a.lora_A.weight": torch.ones(2, 4)}, "a.alpha.*Load LoRA"),
    "stray": (good_tensors() | {"x.to_q.alpha": torch.zeros(1)}, "x.to_q.alpha"),
    "part": (good_tensors() | {"x.to_q.soda_lu": torch.zeros(3)}, "soda_lu"),
    "no tensors": ({}, "no SODA layer"),
    "nan": (good_tensors() | {"x.to_q.soda_lq": NAN}, "x.to_q.soda_lq.*NaN"),
    "inf": (good_tensors() | {"x.to_q.soda_log_R0": torch.tensor([float("inf")])}, "x.to_q.soda_log_R0.*infinite"),
    "angle": (good_tensors() | {"x.to_q.soda_log_R0": torch.tensor([-1001.0])}, "x.to_q.soda_log_R0.*angle of 1001"),
    "dtype": (good_tensors() | {"x.to_q.soda_lq": torch.zeros(24, dtype=torch.int32)}, "soda_lq.*I32"),
    "shape": (good_tensors() | {"x.to_q.soda_lq": torch.zeros(4, 6)}, r"soda_lq.*\(4, 6\)"),
    "scalar": (good_tensors() | {"x.to_q.soda_log_R0": torch.zeros(())}, r"soda_log_R0.*\(\)"),
    "sketch": (good_tensors() | {"x.to_q.soda_sketch": torch.zeros(8, 7)}, r"soda_sketch.*\(8, 7\)"),
    "triangle": (good_tensors() | {"x.to_q.soda_log_R1": torch.zeros(4)}, "soda_log_R1.*4 numbers"),
    "gap": (without("x.to_q.soda_log_R0"), "without gaps"),
    "no rotation": (without(*(f"x.to_q.soda_log_R{j}" for j in range(3))), "soda_log_R0"),
    "six": (good_tensors() | {f"x.to_q.soda_log_R{j}": torch.zeros(0) for j in range(3, 6)}, "soda_log_R4"),
    "two spectra": (good_tensors() | {"x.to_q.soda_svd": torch.zeros(24)}, "more than one spectrum"),
    "long spectrum": (good_tensors() | {"x.to_q.soda_lq": torch.zeros(25)}, "25 numbers"),
    "empty spectrum": (good_tensors() | {"x.to_q.soda_lq": torch.zeros(0)}, "0 numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_named(tmp_path, case):
    tensors, message = WRONG[case]
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path, {"soda.format_version": "1"})
    with pytest.raises(SodaFileError, match=message) as error:
        load(path)
    assert "bad.safetensors" in str(error.value) and ";" in str(error.value)  # the file, and what to do
    assert validate(path) == (False, str(error.value))


def test_a_newer_format_asks_for_an_update(tmp_path):
    save_file(good_tensors(), tmp_path / "f.safetensors", {"soda.format_version": "2"})
    with pytest.raises(SodaFileError, match='"2".*update'):
        load(tmp_path / "f.safetensors")


def test_a_file_without_metadata_is_the_same_adapter(tmp_path):
    """Tools that rewrite LoRA files may take it off."""
    one = Adapter({"a": (layer("svd"),), "b": (layer("qr"),), "c": (layer("none"),)}, metadata(), "one")
    save(one, tmp_path / "whole.safetensors")
    save_file(load_file(tmp_path / "whole.safetensors"), tmp_path / "bare.safetensors")
    bare = load(tmp_path / "bare.safetensors")
    assert bare.content_hash == one.content_hash and bare.role == "other" and not bare.metadata
    assert all(bare.layers[name][0].sketch.equal(one.layers[name][0].sketch) for name in "ab")
    assert as_json(bare)["metadata"] == {} and mix([(bare, 1.0), (one, -1.0)]).layers.keys() == one.layers.keys()
    save(bare, tmp_path / "again.safetensors")
    assert load(tmp_path / "again.safetensors").metadata["soda.format_version"] == "1"


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_a_pickle_is_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Bomb()}, tmp_path / "zip.safetensors")
    (tmp_path / "raw.safetensors").write_bytes(pickle.dumps(Bomb()))
    for name in ("zip", "raw"):
        with pytest.raises(SodaFileError, match="pickle"):
            load(f"{name}.safetensors")
    assert not os.path.exists("exploded")


@pytest.mark.parametrize(
    "data",
    [b"", b"\x02", b"\0" * 8, b"not a safetensors file at all", struct.pack("<Q", 1 << 62) + b"{}",
     struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 64 << 20) + b" " * 64, struct.pack("<Q", 4) + b"[1,]"],
)  # fmt: skip
def test_what_is_no_safetensors_file(tmp_path, data):
    (tmp_path / "f.safetensors").write_bytes(data)
    with pytest.raises(SodaFileError, match="f.safetensors"):
        load(tmp_path / "f.safetensors")


def test_no_such_file(tmp_path):
    with pytest.raises(SodaFileError, match="no such file"):
        load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_file_that_cannot_be_opened_is_no_damaged_one(tmp_path, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    path = tmp_path / "a.safetensors"
    path.touch()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SodaFileError, match=rf"cannot be read \({error.strerror}\); check its permissions") as caught:
        load(path)
    assert "damaged" not in str(caught.value) and "again" not in str(caught.value)
