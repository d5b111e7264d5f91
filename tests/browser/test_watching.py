"""Watching and stopping SODA Train in the page: the live curve, the button, a reload and a second page."""

import itertools
import json
import urllib.request

import pytest
from comfy_page import READY, build_graph, choose, widget_values
from safetensors import safe_open

SEEDS = itertools.count(1000)
TEXT = ".soda-training-text"
BUTTON = "Stop and keep"


def nodes(steps: int, prompt: str = "") -> list[dict]:
    """A training with a seed not used before, whose adapter is saved."""
    settings = {"steps": steps, "batch_size": 1, "seed": next(SEEDS), "learning_rate": 0.02, "sample_prompt": prompt,
                "targets": "cross-attention", "role": "style", "factors": 2}  # fmt: skip
    data = {"images": [1, "images"], "texts": [1, "texts"], "vae": [0, "VAE"], "clip": [0, "CLIP"]}
    return [
        {"type": "SodaPlayground", "box": [0, 0, 240, 90]},
        {"type": "SodaPlaygroundDrawings", "box": [0, 160, 240, 90]},
        {"type": "MakeTrainingDataset", "box": [280, 0, 240, 110], "links": data},
        {"type": "SodaTrain", "box": [560, 0, 360, 480], "values": settings, "links": {"model": [0, "MODEL"],
         "latents": [2, "latents"], "positive": [2, "conditioning"], "clip": [0, "CLIP"], "vae": [0, "VAE"]}},
        {"type": "SodaSave", "box": [960, 0, 320, 190], "links": {"adapter": [3, "adapter"]}},
        {"type": "PreviewAny", "box": [960, 260, 320, 100], "links": {"source": [3, "steps"]}},
    ]  # fmt: skip


def build(page, *args) -> None:
    build_graph(page, nodes(*args))
    page.evaluate("app.canvas.ds.offset = [40, 80]; app.canvas.ds.scale = 1; app.canvas.setDirty(true, true)")


def queue(page) -> None:
    """Until the server has it: an empty queue is then the end of it."""
    page.evaluate("async () => { await app.queuePrompt(0) }")


def wait_for_step(page, step: int) -> None:
    page.wait_for_function(
        "([text, step]) => Number(document.querySelector(text)?.textContent.match(/^step (\\d+)/)?.[1]) >= step",
        arg=[TEXT, step], timeout=90_000,
    )  # fmt: skip


def wait_for_text(page, start: str) -> str:
    page.wait_for_function(
        "([text, start]) => document.querySelector(text)?.textContent.startsWith(start)",
        arg=[TEXT, start], timeout=90_000,
    )  # fmt: skip
    return page.locator(TEXT).text_content()


def points(page, line: str = "soda-losses") -> list[list[float]]:
    """The drawn line's points, in pixels of the drawing."""
    drawn = page.locator(f".soda-training polyline.{line}").get_attribute("points")
    return [[float(number) for number in point.split(",")] for point in drawn.split()]


def drawing_box(page) -> dict[str, float]:
    """The canvas puts a node's elements in their place with the next frame that it draws."""
    drawing = page.locator(".soda-training svg")
    drawing.wait_for()
    return drawing.bounding_box()


@pytest.fixture(autouse=True)
def nothing_runs_on(server):
    """A training whose test failed must not keep the next test's from starting."""
    yield
    for path, body in (("queue", {"clear": True}), ("interrupt", {})):
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{server.url}/{path}", data, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=20).close()


def stop_button(page):
    return page.get_by_role("button", name=BUTTON)


def wait_for_end(page) -> None:
    """Until nothing runs or waits: what a test stopped must not run into the next. Not by `wait_for_function`, which
    takes the promise of an async function for its answer."""
    page.evaluate(
        """async () => {
          for (const last = Date.now() + 90_000; ; await new Promise((go) => setTimeout(go, 50))) {
            const queue = await (await app.api.fetchApi('/queue')).json()
            if (queue.queue_running.length + queue.queue_pending.length === 0) return
            if (Date.now() > last) throw new Error('the queue has not ended after 90 s')
          } }"""
    )


def steps_taken(page) -> int:
    """What the node's output "steps" gave to Preview as Text."""
    page.wait_for_function("() => app.nodeOutputs['6']?.text")
    return int(page.evaluate("app.nodeOutputs['6'].text[0]"))


def adapters(server) -> set[str]:
    return {path.name for path in (server.output / "loras" / "soda").glob("*.safetensors")}


def test_nothing_is_on_the_node_before_it_trains(page):
    build(page, 5)
    assert page.locator(".soda-training").count() == 0


def test_the_curve_grows_and_the_button_keeps_what_is_learnt(page, server):
    build(page, 2000)
    before = adapters(server)
    queue(page)
    wait_for_step(page, 5)
    first = points(page)
    wait_for_step(page, len(first) + 8)
    assert len(points(page)) > len(first) >= 5
    assert len(points(page, "soda-smoothed")) >= len(first)
    drawing = drawing_box(page)
    assert drawing["width"] > 250 and drawing["height"] > 80
    labels = page.locator(".soda-training svg text").all_text_contents()
    assert "step" in labels and any(label.startswith("loss") for label in labels) and len(labels) >= 5

    stop_button(page).click()
    text = wait_for_text(page, "stopped and kept after ")
    assert stop_button(page).is_disabled()
    wait_for_end(page)
    taken = steps_taken(page)
    assert text.startswith(f"stopped and kept after {taken} of 2000 steps") and 13 <= taken < 1000
    assert len(points(page)) == taken
    assert len(adapters(server) - before) == 1


def test_a_reload_in_mid_training_restores_curve_and_button(open_at, server):
    page = open_at()
    build(page, 2000)
    graph = page.evaluate("JSON.stringify(app.graph.serialize())")
    queue(page)
    wait_for_step(page, 8)
    page.reload()
    page.wait_for_function(READY)
    page.wait_for_function("() => app.vueAppReady && !document.querySelector('.p-blockui-mask')")
    if not page.evaluate("app.graph.nodes.some((node) => node.type === 'SodaTrain')"):
        page.evaluate("(graph) => app.loadGraphData(JSON.parse(graph))", graph)
    wait_for_step(page, 9)
    drawn = points(page)
    assert len(drawn) >= 9
    wait_for_step(page, len(drawn) + 4)
    assert len(points(page)) > len(drawn)
    stop_button(page).click()
    wait_for_text(page, "stopped and kept after ")
    wait_for_end(page)


@pytest.mark.parametrize("tabs", [True, False], ids=["two tabs", "two browsers"])
def test_two_pages_show_the_same_and_either_can_stop(open_at, tabs):
    one = open_at()
    other = open_at(beside=one if tabs else None)
    build(one, 2000)
    graph = one.evaluate("JSON.stringify(app.graph.serialize())")
    queue(one)
    wait_for_step(one, 5)
    other.evaluate("(graph) => app.loadGraphData(JSON.parse(graph))", graph)
    wait_for_step(other, 7)
    stop_button(other).click()
    texts = [wait_for_text(page, "stopped and kept after ") for page in (one, other)]
    assert texts[0] == texts[1]
    assert [y for _, y in points(one, "soda-smoothed")] == [y for _, y in points(other, "soda-smoothed")]
    wait_for_end(one)
    assert steps_taken(one) == len(points(one))

    # Another workflow's node of the same id is not the one that trained.
    build(other, 5)
    other.wait_for_timeout(300)
    assert other.locator(".soda-training").count() == 0


OPEN_SUBGRAPH = """() => {
  const outer = app.graph.nodes.find((node) => node.subgraph)
  app.canvas.openSubgraph(outer.subgraph, outer)
}"""


def test_in_a_subgraph_it_is_watched_stopped_and_ends_with_the_strip(page):
    """The node's id on the server is then that of the subgraph's node, a colon, and its own."""
    build(page, 16, "a sks monster")
    inner = page.evaluate(
        """() => {
          const node = app.graph.nodes.find((node) => node.type === 'SodaTrain')
          const {subgraph} = app.graph.convertToSubgraph(new Set([node]))
          return `${subgraph.id}:${subgraph.nodes[0].id}`
        }"""
    )
    page.evaluate(OPEN_SUBGRAPH)
    queue(page)
    wait_for_step(page, 3)
    page.locator(".soda-training .soda-sample").first.wait_for(state="attached")  # after step 4
    stop_button(page).click()
    text = wait_for_text(page, "stopped and kept after ")
    wait_for_end(page)
    assert text.startswith(f"stopped and kept after {steps_taken(page)} of 16 steps")
    page.wait_for_function("(inner) => app.nodeOutputs[inner]?.images?.[0]?.subfolder === 'soda'", arg=inner)
    page.wait_for_function("(inner) => !app.nodePreviewImages[inner]", arg=inner)  # which would hide the strip

    saved = page.evaluate("JSON.stringify(app.rootGraph.serialize())")
    page.evaluate("(graph) => app.loadGraphData(JSON.parse(graph))", saved)
    page.evaluate(OPEN_SUBGRAPH)
    wait_for_text(page, "stopped and kept after ")
    drawing = drawing_box(page)
    assert drawing["width"] > 120 and drawing["height"] > 40 and len(points(page)) >= 4  # at any zoom


def test_samples_are_marked_and_end_as_a_strip(page):
    build(page, 4, "a sks monster")
    queue(page)
    wait_for_text(page, "4 steps")
    assert page.locator(".soda-training .soda-sample").count() == 4
    titles = page.locator(".soda-training .soda-sample title").all_text_contents()
    assert titles == [f"sample after step {step}" for step in (1, 2, 3, 4)]
    wait_for_end(page)
    page.wait_for_function("() => app.nodeOutputs['4']?.images?.[0]?.subfolder === 'soda'")


def test_a_sample_is_shown_on_the_node_while_it_trains_and_cancel_is_told(page, server):
    build(page, 40, "a sks monster")
    before = adapters(server)
    queue(page)
    page.wait_for_function("() => app.nodePreviewImages['4']?.length")  # after step 10
    shown = page.evaluate(
        """async () => { const image = new Image(); image.src = app.nodePreviewImages['4'][0]; await image.decode()
          return [image.naturalWidth, image.naturalHeight] }"""
    )
    assert min(shown) >= 64
    if page.evaluate("LiteGraph.vueNodesMode"):
        page.locator('[data-node-id="4"] img').first.wait_for()
    assert " left" in page.locator(TEXT).text_content()
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Interrupt')")
    text = wait_for_text(page, "cancelled after ")
    assert stop_button(page).is_disabled() and "of 40 steps" in text
    wait_for_end(page)
    assert adapters(server) == before


def test_the_role_is_picked_and_run_the_rest_is_preset(page, server):
    """All widgets of SODA Train as they stand but for the number of steps, for time."""
    made = nodes(3)
    made[3]["values"] = {"steps": 3, "seed": next(SEEDS)}
    build_graph(page, made)
    page.evaluate("app.canvas.ds.offset = [40, 80]; app.canvas.ds.scale = 1; app.canvas.setDirty(true, true)")
    before = adapters(server)
    choose(page, "SodaTrain", "role", "style")
    assert widget_values(page, "SodaTrain")["role"] == "style"
    queue(page)
    wait_for_text(page, "3 steps")
    wait_for_end(page)
    saved = adapters(server) - before
    assert len(saved) == 1, server.log_text()[-3000:]
    (new,) = saved
    with safe_open(server.output / "loras" / "soda" / new, "np") as file:
        role, names = file.metadata()["soda.role"], file.keys()
    assert role == "style" and names and all(".attn1." in name for name in names)


@pytest.mark.parametrize("grown", [0, 150])
def test_saving_and_loading_keeps_values_and_size(page, grown):
    build(page, 3)
    before = widget_values(page, "SodaTrain")
    queue(page)
    wait_for_text(page, "3 steps")
    wait_for_end(page)
    page.evaluate("(by) => { const [, , , n] = app.graph.nodes; n.setSize([n.size[0] + by, n.size[1] + by]) }", grown)
    assert widget_values(page, "SodaTrain") == before
    saved = page.evaluate("JSON.stringify(app.graph.serialize())")
    node = next(node for node in json.loads(saved)["nodes"] if node["type"] == "SodaTrain")
    assert node["widgets_values"] == list(before.values())

    page.evaluate("(graph) => app.loadGraphData(JSON.parse(graph))", saved)
    wait_for_text(page, "3 steps")  # the same workflow: its last training is shown again
    assert widget_values(page, "SodaTrain") == before
    width = page.evaluate("app.graph.nodes.find((node) => node.type === 'SodaTrain').size[0]")
    assert width == pytest.approx(node["size"][0], abs=1)
    page.evaluate("app.queuePrompt(0)")
    wait_for_end(page)
