"""What a queued prompt says about its adapters: prompts as anybody may post them."""

from __future__ import annotations

import copy

import pytest
from soda_pack.nodes.image_metadata import adapters_of, add_adapters

SUBJECT, STYLE = "soda_subject.safetensors", "soda_style.safetensors"


def loader(name=SUBJECT, strength=1.0):
    return {"class_type": "SodaLoader", "inputs": {"model": ["0", 0], "adapter_name": name, "strength": strength}}


def mix(*sockets, **row):
    values = {
        "row": "adapter",
        "row.adapter_name": "(wired)",
        "row.weight": 0.5,
        "row.role": "auto",
        "row.row2": "none",
    }
    wired = {f"adapters.adapter{n}": socket for n, socket in enumerate(sockets)}
    return {"class_type": "SodaMix", "inputs": {"model": ["0", 0], **values, **row, **wired}}


def sampler(node):
    return {"class_type": "KSampler", "inputs": {"model": [node, 0]}}


@pytest.mark.parametrize(
    "request_",
    [
        None,
        [],
        {},
        {"prompt": []},
        {"prompt": {"1": None, "2": {"class_type": "SodaMix"}, "3": {"inputs": []}}},
        {"prompt": {"1": {"class_type": "KSampler", "inputs": {"model": ["7", 0]}}}, "extra_data": {}},
    ],
    ids=range(6),
)
def test_what_names_no_adapter_stays_as_it_is(request_):
    assert add_adapters(copy.deepcopy(request_)) == request_


@pytest.mark.parametrize("name", ["absent.safetensors", "../../etc/passwd", "a\0b", ["9", 0], 7, ""])
def test_a_file_that_is_not_there_is_named_without_hashes(name):
    (entry,) = adapters_of({"1": loader(name), "2": sampler("1")})
    assert "hashes" not in entry and entry["weight"] == 1.0


def test_what_the_page_sent_along_stays():
    workflow = {"nodes": []}
    request_ = {"prompt": {"1": loader(), "2": sampler("1")}, "client_id": "x",
                "extra_data": {"extra_pnginfo": {"workflow": workflow}, "other": 1}}  # fmt: skip
    found = add_adapters(request_)
    assert found["extra_data"]["extra_pnginfo"]["workflow"] is workflow and found["extra_data"]["other"] == 1
    (entry,) = found["extra_data"]["extra_pnginfo"]["soda"]
    assert entry["name"] == SUBJECT and entry["role"] == "subject" and len(entry["hashes"]["SHA256"]) == 64


def test_a_mix_of_a_mix_multiplies_its_weights():
    prompt = {
        "1": loader(STYLE, 9.0),
        "2": mix(["1", 2]),
        "3": mix(["2", 2], **{"row.weight": -0.5}),
        "4": sampler("3"),
    }
    (entry,) = adapters_of(prompt)
    assert (entry["node"], entry["name"], entry["weight"], entry["role"]) == ("3", STYLE, -0.25, "style")


def test_a_role_given_in_the_row_counts_and_a_trained_adapter_is_named_by_its_node():
    train = {"class_type": "SodaTrain", "inputs": {}}
    prompt = {"1": train, "2": mix(["1", 0], **{"row.role": "style"}), "3": sampler("2")}
    (entry,) = adapters_of(prompt)
    assert entry == {"node": "2", "name": "from node 1, SodaTrain", "weight": 0.5, "role": "style"}


def test_a_weight_that_a_link_brings_is_left_open():
    (entry,) = adapters_of({"1": loader(strength=["8", 0]), "2": sampler("1")})
    assert "weight" not in entry and entry["hashes"]


def test_mixes_wired_in_a_circle_end():
    prompt = {"1": mix(["2", 2]), "2": mix(["1", 2]), "3": sampler("1")}
    assert all("hashes" not in entry for entry in adapters_of(prompt))
