"""What ComfyUI Manager does with the published pack: pip for requirements.txt, install.py, a restart. Twice."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runner.client import Client
from runner.server import Server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """The pack as the registry ships it, without what .comfyignore names, in the folder of a ComfyUI."""
    ignored = {
        line.strip("/ ") for line in (ROOT / ".comfyignore").read_text().splitlines() if line[:1] not in ("", "#")
    }
    ignored |= {".git", ".venv", "soda-demo"}

    def leave_out(folder: str, names: list[str]) -> set[str]:
        inside = Path(folder).relative_to(ROOT)
        return {name for name in names if name == "__pycache__" or (inside / name).as_posix() in ignored}

    (tmp_path / "ComfyUI" / "models").mkdir(parents=True)
    target = tmp_path / "ComfyUI" / "custom_nodes" / "soda-adapters"
    shutil.copytree(ROOT, target, ignore=leave_out)
    return target


def run(pack: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COMFYUI_PATH")}
    done = subprocess.run([sys.executable, *arguments], cwd=pack, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_requirements_then_install_twice_then_the_server(pack: Path):
    folder = pack.parents[1] / "models" / "soda"
    lines = [line for line in (pack / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert lines
    installed = run(pack, "-m", "pip", "freeze")
    for _ in range(2):
        for line in lines:
            run(pack, "-m", "pip", "install", line)
        output = run(pack, "install.py")
        assert str(folder) in output and "restart ComfyUI" in output
        assert folder.is_dir()
    assert run(pack, "-m", "pip", "freeze") == installed, "requirements.txt changes a ComfyUI environment"

    with Server(Path(os.environ["COMFYUI_PATH"]), sys.executable, pack) as server, Client(server) as client:
        assert "SodaLoader" in client.get_json("/object_info")
        assert client.get("/extensions/ComfyUI-SODA/docs/SodaLoader.md")


def test_install_outside_a_comfyui_says_so_and_succeeds(tmp_path: Path):
    shutil.copyfile(ROOT / "install.py", tmp_path / "install.py")
    assert "custom_nodes" in run(tmp_path, "install.py")
    assert [path.name for path in tmp_path.iterdir()] == ["install.py"]


def test_install_where_the_folder_cannot_be_made_fails_with_a_remedy(tmp_path: Path):
    pack = tmp_path / "ComfyUI" / "custom_nodes" / "soda-adapters"
    pack.mkdir(parents=True)
    (tmp_path / "ComfyUI" / "models").write_text("a file where the folder should be")
    shutil.copyfile(ROOT / "install.py", pack / "install.py")
    done = subprocess.run([sys.executable, "install.py"], cwd=pack, capture_output=True, text=True)
    assert done.returncode == 1
    assert "by hand" in done.stderr
