"""The page's help panel shows the pack's own page for every node."""

import re
from pathlib import Path

from comfy_page import build_graph

DOCS = Path(__file__).resolve().parents[2] / "web" / "docs"


def test_help_panel_shows_every_node_s_page(page):
    types = page.evaluate("Object.keys(LiteGraph.registered_node_types).filter((type) => type.startsWith('Soda'))")
    assert sorted(types) == sorted(path.stem for path in DOCS.glob("*.md"))
    for type_ in types:
        title, _, first = (DOCS / f"{type_}.md").read_text(encoding="utf-8").split("\n")[:3]
        build_graph(page, [{"type": type_, "box": [300, 200, 300, 200]}])
        page.evaluate("app.canvas.selectNode(app.graph.nodes[0])")
        if not page.get_by_role("heading", name=title.removeprefix("# "), exact=True).is_visible():
            page.get_by_test_id("info-button").click()
        page.get_by_role("heading", name=title.removeprefix("# "), exact=True).first.wait_for()
        page.get_by_text(first[:40]).first.wait_for()
        for picture in re.findall(r"!\[.*?\]\((.+?)\)", (DOCS / f"{type_}.md").read_text(encoding="utf-8")):
            page.wait_for_function(
                "(name) => [...document.images].some((it) => it.src.endsWith(name) && it.naturalWidth > 300)",
                arg=picture,
            )
