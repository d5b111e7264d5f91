"""A real ComfyUI in this process, on the CPU, with the pack loaded as ComfyUI loads it: by path, under its own name.

Where COMFYUI_ARGUMENTS lets ComfyUI use a GPU, the tests of what a GPU does otherwise run instead (test_*_cuda.py).
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH")
if not COMFYUI:
    raise pytest.UsageError("These tests need a ComfyUI: set COMFYUI_PATH to its folder, or run `python run.py test`.")
# The pack has a folder `nodes`, ComfyUI a module `nodes`: the repository must not be importable here.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT.parent)]
sys.path[:0] = [COMFYUI, str(Path(__file__).parent)]
os.chdir(COMFYUI)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)
from comfy.cli_args import args  # noqa: E402

args.cpu = "--cpu" in os.environ.get("COMFYUI_ARGUMENTS", "--cpu")
collect_ignore = [p.name for p in Path(__file__).parent.glob("test_*.py") if p.stem.endswith("_cuda") == args.cpu]
args.base_directory = tempfile.mkdtemp(prefix="soda-tests-")

import folder_paths  # noqa: E402


def _load_pack():
    spec = importlib.util.spec_from_file_location(
        "soda_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["soda_pack"] = module
    spec.loader.exec_module(module)
    return module


PACK = _load_pack()
from soda_pack.soda.hosts.comfy import folders, preview, stock  # noqa: E402

folders.register()


@pytest.fixture
def output(tmp_path):
    """A fresh output folder for one test."""
    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    paths = folder_paths.folder_names_and_paths[folders.FOLDER]
    kept = list(paths[0])
    folders.register()
    yield tmp_path
    folder_paths.set_output_directory(before)
    paths[0][:] = kept
    folder_paths.filename_list_cache.pop(folders.FOLDER, None)


@pytest.fixture
def rough_samples(monkeypatch):
    """Samples of trainings in few steps: how many there are changes nothing that is tested."""
    monkeypatch.setattr(preview, "STEPS", 4)


@pytest.fixture
def loras(tmp_path):
    """The class for core's own loaders registered, and a loras folder for one test."""
    stock.register()
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    yield tmp_path
    folder_paths.folder_names_and_paths["loras"][0].remove(str(tmp_path))
    folder_paths.filename_list_cache.pop("loras", None)
