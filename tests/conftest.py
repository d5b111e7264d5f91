"""Keeps the rungs of the ladder apart: the ones below cannot share a process (see runner/ladder.py)."""

from pathlib import Path

import pytest

IN_PROCESS = {"comfy"}  # imports ComfyUI, whose top level has modules of this repository's names


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    folders = {item.path.relative_to(here).parts[0] for item in items if here in item.path.parents}
    if folders & IN_PROCESS and folders - IN_PROCESS:
        raise pytest.UsageError("tests/comfy needs a pytest process of its own; `python run.py test` does that.")
