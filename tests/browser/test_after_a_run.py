"""What the page shows once nodes have run: text on the node, and new files in the lists without a reload."""

import re

from comfy_page import build_graph, choices, choose, run_workflow, widget_values

SUBJECT = "soda_subject.safetensors"


STRENGTHS = iter(range(1, 100))


def build_and_run(page) -> float:
    """Loads, mixes and saves with a strength not used before, so that nothing comes from the server's cache."""
    strength = next(STRENGTHS) / 100
    nodes = [
        {"type": "SodaPlayground", "box": [0, 0, 240, 90]},
        {"type": "SodaLoader", "box": [0, 160, 320, 200], "links": {"model": [0, "MODEL"]},
         "values": {"adapter_name": SUBJECT, "strength": strength}},
        {"type": "SodaMix", "box": [360, 0, 340, 460], "links": {"model": [0, "MODEL"]},
         "values": {"row": "adapter", "row.adapter_name": SUBJECT, "row.weight": strength}},
        {"type": "SodaSave", "box": [0, 430, 320, 190], "links": {"adapter": [1, "adapter"]}},
        {"type": "PreviewAny", "box": [740, 0, 200, 100], "links": {"source": [2, "adapter"]}},
    ]  # fmt: skip
    build_graph(page, nodes)
    run_workflow(page)
    return strength


def test_new_file_is_in_every_list_and_no_value_is_lost(page):
    build_graph(page, [{"type": "SodaLoader"}])
    before = choices(page, "SodaLoader", "adapter_name")
    strength = build_and_run(page)
    page.wait_for_function(
        "(count) => app.graph.nodes[1].widgets[0].options.values.length === count + 1", arg=len(before)
    )
    files = choices(page, "SodaLoader", "adapter_name")
    (new,) = set(files) - set(before)
    assert choices(page, "SodaMix", "row.adapter_name") == ["(wired)", *files]
    assert widget_values(page, "SodaLoader") == {
        "adapter_name": SUBJECT, "strength": strength, "strength_clip": 1, "mode": "auto",
    }  # fmt: skip
    assert widget_values(page, "SodaMix")["row.weight"] == strength
    assert choices(page, "SodaMix", "row") == ["none", "adapter"]

    choose(page, "SodaLoader", "adapter_name", new)
    choose(page, "SodaMix", "row.row2", "adapter")
    choose(page, "SodaMix", "row.row2.adapter_name", new)
    assert widget_values(page, "SodaLoader")["adapter_name"] == new
    values = widget_values(page, "SodaMix")
    assert (values["row.adapter_name"], values["row.row2.adapter_name"]) == (SUBJECT, new)
    run_workflow(page)


def test_nodes_say_what_they_did(page):
    build_and_run(page)
    page.get_by_text("layers").first.wait_for()
    assert page.get_by_text("layers").count() >= 2
    page.get_by_text(re.compile("^Saved .*safetensors")).wait_for()
