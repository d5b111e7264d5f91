"""Every shipped workflow in the real page: it is offered, opens whole, looks tidy, and runs to its end."""

import json
from pathlib import Path

import pytest
from comfy_page import boxes, open_at_template, run_workflow, set_widgets

from runner.server import PACK
from runner.workflow import to_prompt

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
SHORT = {"KSampler": {"steps": 1}, "EmptyLatentImage": {"batch_size": 1}, "SodaTrain": {"steps": 2, "batch_size": 1}}


def test_there_are_five_templates_with_a_thumbnail_each():
    assert len(NAMES) == 5
    assert sorted(path.stem for path in FOLDER.glob("*.jpg")) == NAMES


def test_template_browser_lists_them_with_their_thumbnails(page):
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text(PACK, exact=True).click()
    for name in NAMES:
        card = page.get_by_test_id(f"template-workflow-{name}")
        card.wait_for()
        picture = card.locator("img").first.element_handle()
        page.wait_for_function("(img) => img.complete && img.naturalWidth > 0", arg=picture)
    page.get_by_test_id(f"template-workflow-{NAMES[0]}").click()
    page.wait_for_function("() => app.graph.nodes.some((node) => node.type === 'SodaLoader')")


@pytest.mark.parametrize("name", NAMES)
def test_opens_whole_and_runs(name, open_at):
    page = open_at_template(open_at, PACK, name)
    saved = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    types = page.evaluate("app.graph.nodes.map((node) => node.type)")
    assert sorted(types) == sorted(node["type"] for node in saved["nodes"])
    assert set(types) <= set(page.evaluate("Object.keys(LiteGraph.registered_node_types)"))

    object_info = page.evaluate("async () => (await app.api.fetchApi('/object_info')).json()")
    asked = page.evaluate("async () => (await app.graphToPrompt()).output")
    for entry in asked.values():
        del entry["_meta"]
    assert asked == to_prompt(saved, object_info)

    set_widgets(page, SHORT)
    run_workflow(page)
    shown = page.evaluate(
        """() => app.graph.nodes.filter((node) => node.type === 'PreviewImage')
          .map((node) => app.nodeOutputs[node.id]?.images?.length ?? 0)"""
    )
    assert len(shown) >= 2 and all(shown)
    assert overlaps(boxes(page)) == []


def overlaps(found: dict[str, list[float]]) -> list[tuple[str, str]]:
    """Pairs of nodes whose boxes (left, top, right, bottom) cut each other."""

    def cut(a: list[float], b: list[float]) -> bool:
        return all(a[axis] < b[axis + 2] and b[axis] < a[axis + 2] for axis in (0, 1))

    return [(a, b) for a in found for b in found if a < b and cut(found[a], found[b])]
