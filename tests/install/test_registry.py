"""What the Comfy Registry and Manager read from pyproject.toml, parsed by ComfyUI's own code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARSE = """
import sys
sys.path.insert(0, sys.argv[1])
from comfy_config.config_parser import extract_node_configuration
print(extract_node_configuration(sys.argv[2]).model_dump_json())
"""


@pytest.fixture(scope="module")
def configuration() -> dict:
    command = [sys.executable, "-c", PARSE, os.environ["COMFYUI_PATH"], str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_project(configuration):
    project = configuration["project"]
    assert "comfyui" not in project["name"].lower() and len(project["name"]) < 100
    assert project["version"].count(".") == 2
    assert len(project["description"]) > 40
    assert project["urls"]["repository"].startswith("https://")


def test_comfy_section(configuration):
    section = configuration["tool_comfy"]
    assert section["publisher_id"] and section["display_name"]
    icon = section["icon"].rpartition("/main/")[2]
    assert (ROOT / icon).is_file()
    # WEB_DIRECTORY registers the page's files; a second registration would load every script twice.
    assert not section["web"]


def test_the_licence_is_the_whole_apache_text():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_requirements_match_the_library_dependencies(configuration):
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    names = [dependency.split(">")[0] for dependency in configuration["project"]["dependencies"]]
    assert sorted(lines) == sorted(names)
