"""What the server says about the pack: nodes, tooltips, help pages, translations, templates, live file lists."""

import json
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODES = {
    "SodaLoader": "SODA Loader",
    "SodaMix": "SODA Mix",
    "SodaStack": "SODA Stack",
    "SodaTrain": "SODA Train",
    "SodaTrainOptions": "SODA Train Options",
    "SodaSave": "SODA Save",
    "SodaConvert": "SODA Convert",
    "SodaTransport": "SODA Transport",
    "SodaPlayground": "SODA Playground",
    "SodaPlaygroundDrawings": "SODA Playground Drawings",
}


@pytest.fixture(scope="module")
def definitions(client) -> dict:
    return {name: entry for name, entry in client.get_json("/object_info").items() if name.startswith("Soda")}


def test_the_pack_loads_without_a_complaint(startup_log):
    assert "ComfyUI-SODA" in startup_log
    complaint = r"^.*(?:IMPORT FAILED|Cannot import|Traceback|comfy_entrypoint|ERROR).*$"
    assert not re.findall(complaint, startup_log, re.MULTILINE)


def test_exactly_the_documented_nodes(definitions):
    assert {name: entry["display_name"] for name, entry in definitions.items()} == NODES


@pytest.mark.parametrize("name", NODES)
def test_category_and_description(definitions, name):
    assert definitions[name]["category"] == "SODA"
    assert len(definitions[name]["description"]) > 20


def inputs_of(definition: dict):
    """(name, options) of every input, those inside dynamic inputs included."""
    for group in definition.values():
        for name, (_, *rest) in group.items():
            options = rest[0] if rest else {}
            yield name, options
            for choice in options.get("options") or []:
                if isinstance(choice, dict):
                    yield from inputs_of(choice["inputs"])
            if "template" in options:
                yield from inputs_of(options["template"]["input"])


@pytest.mark.parametrize("name", NODES)
def test_every_input_has_a_tooltip(definitions, name):
    group = {key: value for key, value in definitions[name]["input"].items() if key != "hidden"}
    without = [input_name for input_name, options in inputs_of(group) if not options.get("tooltip")]
    assert not without


@pytest.mark.parametrize("name", NODES)
def test_every_output_has_a_tooltip(definitions, name):
    assert all(definitions[name]["output_tooltips"])


@pytest.mark.parametrize("name", NODES)
def test_every_node_has_a_help_page(client, name):
    page = client.get(f"/extensions/ComfyUI-SODA/docs/{name}.md").decode()
    assert len(page) > 200


def test_templates_are_offered(client):
    offered = client.get_json("/workflow_templates")["ComfyUI-SODA"]
    assert sorted(offered) == sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
    assert len(offered) >= 4
    for name in offered:
        assert json.loads(client.get(f"/api/workflow_templates/ComfyUI-SODA/{name}.json"))["nodes"]
        assert client.get(f"/api/workflow_templates/ComfyUI-SODA/{name}.jpg")[:2] == b"\xff\xd8"


def adapter_names(client) -> list[str]:
    entry = client.get_json("/object_info/SodaLoader")["SodaLoader"]["input"]["required"]["adapter_name"]
    return entry[1]["options"]


def test_a_new_file_is_listed_at_once_and_gone_at_once(client, adapters, subject):
    assert subject in adapter_names(client)
    copy = adapters / "copied_in.safetensors"
    shutil.copyfile(adapters / subject, copy)
    assert copy.name in adapter_names(client)
    copy.unlink()
    assert copy.name not in adapter_names(client)


def test_files_in_models_soda_and_in_a_loras_root_are_listed(client, adapters, subject):
    base = client.server.base / "models"
    for number, folder in enumerate((base / "soda", base / "loras" / "soda")):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"placed_{number}.safetensors"
        shutil.copyfile(adapters / subject, file)
        assert file.name in adapter_names(client)
        file.unlink()
