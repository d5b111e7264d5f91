"""SODA Mix's rows and sockets, by mouse, in both renderers."""

import uuid

import pytest
from comfy_page import build_graph, choices, choose, widget_values

FILE = "soda_subject.safetensors"
PLAYGROUND = {"type": "SodaPlayground", "box": [0, 0, 240, 90]}
LOADER = {"type": "SodaLoader", "box": [0, 200, 300, 190], "links": {"model": [0, "MODEL"]}}
MIX = {"type": "SodaMix", "box": [360, 0, 340, 420], "links": {"model": [0, "MODEL"]}}
TWO_ROWS = {
    "row": "adapter", "row.adapter_name": FILE, "row.weight": 0.35, "row.role": "style",
    "row.row2": "adapter", "row.row2.weight": -0.2,
}  # fmt: skip
ONE_WIRED = {"row": "adapter", "row.row2": "adapter", "row.row2.weight": 0.6}
WIRED = {"adapters.adapter0": [1, "adapter"], "adapters.adapter1": [1, "adapter"]}


def prompt_of_mix(page) -> dict:
    output = page.evaluate("async () => (await app.graphToPrompt()).output")
    return next(entry["inputs"] for entry in output.values() if entry["class_type"] == "SodaMix")


def sockets(page) -> dict[str, bool]:
    return page.evaluate(
        """() => Object.fromEntries(app.graph.nodes.find((node) => node.type === 'SodaMix').inputs
          .filter((input) => input.name.startsWith('adapters.')).map((input) => [input.name, input.link != null]))"""
    )


def test_filling_a_row_shows_the_next_and_keeps_the_first(page):
    build_graph(page, [PLAYGROUND, MIX])
    assert widget_values(page, "SodaMix") == {"row": "none", "mode": "auto"}
    choose(page, "SodaMix", "row", "adapter")
    choose(page, "SodaMix", "row.role", "style")
    page.evaluate("app.graph.nodes[1].widgets.find((w) => w.name === 'row.weight').value = 0.35")
    choose(page, "SodaMix", "row.row2", "adapter")
    values = widget_values(page, "SodaMix")
    assert list(values) == [
        "row", "row.adapter_name", "row.weight", "row.role",
        "row.row2", "row.row2.adapter_name", "row.row2.weight", "row.row2.role", "row.row2.row3",
        "mode",
    ]  # fmt: skip
    assert (values["row"], values["row.weight"], values["row.role"]) == ("adapter", 0.35, "style")
    assert values["row.row2.row3"] == "none"
    labels = page.evaluate("app.graph.nodes[1].widgets.map((widget) => widget.label)")
    kinds = ("adapter", "file", "weight", "role")
    assert labels == [f"{kind} {row}" for row in (1, 2) for kind in kinds] + ["adapter 3", "mode"]

    choose(page, "SodaMix", "row.row2", "none")
    assert list(widget_values(page, "SodaMix").items()) == [
        *list(values.items())[:4], ("row.row2", "none"), ("mode", "auto"),
    ]  # fmt: skip


def test_all_eight_rows(page):
    rows, row = {}, "row"
    for number in range(2, 10):
        rows |= {row: "adapter", f"{row}.weight": number / 10}
        row = f"{row}.row{number}"
    build_graph(page, [PLAYGROUND, MIX | {"values": rows}])
    values = widget_values(page, "SodaMix")
    assert {name: values[name] for name in rows} == rows
    assert not any(name.endswith("row9") for name in values)


def test_wired_sockets_grow_and_close_up(page):
    build_graph(page, [PLAYGROUND, LOADER, MIX])
    assert sockets(page) == {"adapters.adapter0": False}
    for number in range(2):
        page.evaluate(
            """(name) => { const [, loader, mix] = app.graph.nodes
              loader.connect(2, mix, mix.inputs.findIndex((input) => input.name === name)) }""",
            f"adapters.adapter{number}",
        )
    assert sockets(page) == {"adapters.adapter0": True, "adapters.adapter1": True, "adapters.adapter2": False}
    page.evaluate(
        """() => { const mix = app.graph.nodes[2]
          mix.disconnectInput(mix.inputs.findIndex((input) => input.name === 'adapters.adapter0')) }"""
    )
    page.wait_for_function("() => app.graph.nodes[2].inputs.filter((i) => i.name.startsWith('adapters.')).length === 2")
    assert sockets(page) == {"adapters.adapter0": True, "adapters.adapter1": False}


@pytest.mark.parametrize("values", [TWO_ROWS, ONE_WIRED], ids=["files", "wired"])
def test_saving_and_reloading_keeps_rows_and_links(page, open_at, values):
    build_graph(page, [PLAYGROUND, LOADER, MIX | {"values": values, "links": MIX["links"] | WIRED}])
    name = uuid.uuid4().hex
    before, asked = widget_values(page, "SodaMix"), prompt_of_mix(page)
    assert asked["adapters.adapter1"] == ["2", 2] and asked["row.row2.weight"] == values["row.row2.weight"]
    page.evaluate("() => void app.extensionManager.command.execute('Comfy.SaveWorkflow')")
    page.get_by_role("dialog").get_by_role("textbox").fill(name)
    page.keyboard.press("Enter")
    page.wait_for_function(
        """(path) => { const {activeWorkflow} = app.extensionManager.workflow
          return activeWorkflow?.path === path && !activeWorkflow.isModified }""",
        arg=f"workflows/{name}.json",
    )

    again = open_at()
    again.evaluate(
        """async (name) => {
          const answer = await app.api.fetchApi(`/userdata/workflows%2F${name}.json`)
          await app.loadGraphData(await answer.json()) }""",
        name,
    )
    assert widget_values(again, "SodaMix") == before
    assert prompt_of_mix(again) == asked


def test_rows_offer_the_files_that_the_loader_offers(page):
    build_graph(page, [PLAYGROUND, LOADER, MIX | {"values": TWO_ROWS}])
    files = choices(page, "SodaLoader", "adapter_name")
    assert files
    for name in ("row.adapter_name", "row.row2.adapter_name"):
        assert choices(page, "SodaMix", name) == ["(wired)", *files]
