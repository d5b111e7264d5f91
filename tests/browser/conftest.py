"""One real server and one real browser for all tests here, and for each module a page in either renderer."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from comfy_page import open_browser, open_page  # noqa: E402

from runner.server import Server  # noqa: E402

CAPTION = "a photo of sks dog"


@pytest.fixture(scope="session")
def server():
    """ComfyUI on a CPU with this pack alone, and a folder of three photos for the workflow that trains on them."""
    arguments = ("--cpu", "--use-pytorch-cross-attention")
    with Server(Path(os.environ["COMFYUI_PATH"]), sys.executable, ROOT, arguments=arguments) as running:
        photos = running.base / "input" / "my_photos"
        photos.mkdir()
        for number, size in enumerate([(300, 200), (200, 260), (128, 128)]):
            Image.effect_noise(size, 60).convert("RGB").save(photos / f"{number}.jpg")
            (photos / f"{number}.txt").write_text(CAPTION)
        yield running


@pytest.fixture(scope="session")
def browser():
    with open_browser() as running:
        yield running


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes2"])
def nodes2(request) -> bool:
    """Whether the page draws nodes with Vue components (Nodes 2.0) or on the classic canvas."""
    return request.param


@contextmanager
def opener(server, browser, nodes2: bool):
    """Opens pages: open_(query, beside) -> Page. They are closed at the end; an uncaught error in any of them is an
    error."""
    pages, errors = [], []

    def open_(query: str = "", beside=None):
        page = open_page(browser, server.url, nodes2=nodes2, query=query, beside=beside)
        page.on("pageerror", lambda error: errors.append(str(error)))
        pages.append(page)
        return page

    yield open_
    for person in {page.context for page in pages}:
        person.close()
    assert not errors


@pytest.fixture
def open_at(server, browser, nodes2):
    """Pages of one test: open_at("?template=...") -> Page."""
    with opener(server, browser, nodes2) as open_:
        yield open_


@pytest.fixture(scope="module")
def page(server, browser, nodes2):
    """One page for a module's tests in each renderer: opening one takes seconds."""
    with opener(server, browser, nodes2) as open_:
        yield open_()
