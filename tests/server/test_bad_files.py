"""Files that are no adapters, or not for this model: an error on the node; server and model stay as they were."""

import pickle
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from prompts import Playground, Prompt

from runner.client import PromptFailed, Refused


def load_error(client, name: str) -> str:
    prompt = Prompt()
    playground = Playground(prompt)
    playground.sample((playground.load(name), 0))
    with pytest.raises(PromptFailed) as caught:
        client.run(prompt)
    assert caught.value.result.error["type"] == "SodaLoader"
    return str(caught.value)


def test_no_such_file_is_refused_by_name(client, subject, base_unchanged):
    prompt = Prompt()
    playground = Playground(prompt)
    playground.sample((playground.load("no_such_file.safetensors"), 0))
    with pytest.raises(Refused) as caught:
        client.run(prompt)
    assert caught.value.status == 400
    assert "no_such_file.safetensors" in caught.value.body


class Payload:
    """Leaves a file behind when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def broken_bytes(kind: str, good: bytes, scratch: Path) -> bytes:
    return {
        "text": b"this is a text file\n" * 50,
        "empty": b"",
        "truncated": good[: len(good) // 2],
        "header cut": good[:20],
        "huge header": struct.pack("<Q", 2**62) + good[8:],
        "pickle": pickle.dumps(Payload(scratch / "unpickled")),
    }[kind]


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "header cut", "huge header", "pickle"])
def test_not_a_whole_safetensors_file(client, adapters, subject, base_unchanged, tmp_path, kind):
    file = adapters / f"broken_{kind.replace(' ', '_')}.safetensors"
    file.write_bytes(broken_bytes(kind, (adapters / subject).read_bytes(), tmp_path))
    message = load_error(client, file.name)
    assert file.name in message
    assert not (tmp_path / "unpickled").exists()


def first(tensors: dict, ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


def unknown_name(tensors: dict) -> str:
    name = first(tensors, ".soda_log_R0")
    tensors[name.replace("soda_log_R0", "soda_turn")] = tensors.pop(name)
    return name.rsplit(".", 1)[0]


def missing_factor(tensors: dict) -> str:
    name = first(tensors, ".soda_log_R1")
    del tensors[name]
    return name.rsplit(".", 1)[0]


def not_triangular(tensors: dict) -> str:
    name = first(tensors, ".soda_log_R1")
    tensors[name] = torch.zeros(4)
    return name.rsplit(".", 1)[0]


def two_dimensional(tensors: dict) -> str:
    name = first(tensors, ".soda_lq")
    tensors[name] = tensors[name][None]
    return name


def integers(tensors: dict) -> str:
    name = first(tensors, ".soda_lq")
    tensors[name] = tensors[name].to(torch.int64)
    return name


def not_a_number(tensors: dict) -> str:
    name = first(tensors, ".soda_lq")
    tensors[name][3] = float("nan")
    return name


def infinite(tensors: dict) -> str:
    name = first(tensors, ".soda_log_R2")
    tensors[name][0] = float("inf")
    return name


def low_rank(tensors: dict) -> str:
    tensors.clear()
    tensors["unet.down.lora_up.weight"] = torch.zeros(4, 2)
    tensors["unet.down.lora_down.weight"] = torch.zeros(2, 4)
    return "lora"


@pytest.mark.parametrize(
    "spoil",
    [unknown_name, missing_factor, not_triangular, two_dimensional, integers, not_a_number, infinite, low_rank],
)
def test_wrong_tensors_are_named(client, adapters, subject, base_unchanged, spoil):
    file = adapters / f"spoilt_{spoil.__name__}.safetensors"
    tensors = safetensors.torch.load_file(adapters / subject)
    culprit = spoil(tensors)
    safetensors.torch.save_file(tensors, file, {"soda.format_version": "1"})
    message = load_error(client, file.name)
    assert file.name in message
    assert culprit in message


def other_names(tensors: dict) -> dict:
    return {name.replace("diffusion_model.", "diffusion_model.joint_blocks."): t for name, t in tensors.items()}


def other_widths(tensors: dict) -> dict:
    """The same layer names for rotated sides of other widths: every factor's log of size 5."""
    return {
        name: torch.zeros(10) if "soda_log" in name else torch.zeros(125) if name.endswith("soda_lq") else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("change", [other_names, other_widths])
def test_an_adapter_for_another_architecture(client, adapters, subject, base_unchanged, change):
    file = adapters / f"{change.__name__}.safetensors"
    tensors = change(safetensors.torch.load_file(adapters / subject))
    safetensors.torch.save_file(tensors, file, {"soda.format_version": "1"})
    message = load_error(client, file.name)
    assert file.stem in message
    assert "match" in message or "fit" in message


def test_an_adapter_that_fits_in_part_says_which_keys_did_not(client, adapters, subject, base_unchanged):
    file = adapters / "in_part.safetensors"
    tensors = safetensors.torch.load_file(adapters / subject)
    layer = first(tensors, ".soda_lq").rsplit(".", 1)[0]
    renamed = {name.replace(layer, "diffusion_model.elsewhere.to_q"): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(renamed, file, {"soda.format_version": "1"})
    prompt = Prompt()
    playground = Playground(prompt)
    node = playground.load(file.name)
    playground.sample((node, 0))
    result = client.run(prompt)
    assert "diffusion_model.elsewhere.to_q" in result.texts[node][-1]
