"""ComfyUI's real page in a real browser: finding Chromium, opening the page, building, reading and running graphs."""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from playwright.sync_api import Browser, Page, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeout

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-quic"]  # fmt: skip
READY = "() => window.app?.graph && window.app.extensionManager && LiteGraph.registered_node_types.SodaLoader"

BUILD = """async ({nodes, groups}) => {
  await app.loadGraphData({version: 0.4, nodes: [], links: [], groups: [], last_node_id: 0, last_link_id: 0})
  const made = nodes.map(({type, box, title, values}) => {
    const node = LiteGraph.createNode(type)
    if (!node) throw new Error(`no node ${type}`)
    app.graph.add(node)
    if (title) node.title = title
    for (const [name, value] of Object.entries(values)) {
      const widget = node.widgets?.find((w) => w.name === name)
      if (!widget) throw new Error(`${type} has no widget ${name}, only ${node.widgets?.map((w) => w.name)}`)
      widget.value = value
    }
    if (box) { node.pos = box.slice(0, 2); node.setSize(box.slice(2)) }
    return node
  })
  nodes.forEach(({links, type}, i) => Object.entries(links).forEach(([input, [source, output]]) => {
    const from = made[source].outputs.findIndex((o) => o.name === output)
    const to = made[i].inputs.findIndex((o) => o.name === input)
    if (from < 0 || to < 0 || !made[source].connect(from, made[i], to))
      throw new Error(`no link ${made[source].type}.${output} -> ${type}.${input}; it has ` +
        made[i].inputs.map(({name}) => name))
  }))
  for (const {title, color, box} of groups) {
    const group = new LiteGraph.LGraphGroup(title)
    group.pos = box.slice(0, 2); group.size = box.slice(2); group.color = color
    app.graph.add(group)
  }
  return made.map((node) => node.id)
}"""

RUN = """async (seconds) => {
  const seen = new Promise((resolve, reject) => {
    app.api.addEventListener('execution_success', () => resolve(), {once: true})
    app.api.addEventListener('execution_error', ({detail}) =>
      reject(new Error(`${detail.node_type}: ${detail.exception_message}`)), {once: true})
    setTimeout(() => reject(new Error(`no end after ${seconds} s`)), seconds * 1000)
  })
  if (!await app.queuePrompt(0)) throw new Error('the server refused the prompt: ' + JSON.stringify(app.lastNodeErrors))
  await seen
}"""


def browser_path() -> str | None:
    """An installed Chromium or Chrome (SODA_BROWSER names one), or None: Playwright's own download."""
    if named := os.environ.get("SODA_BROWSER"):
        return named
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def open_browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=FLAGS)
        yield browser
        browser.close()


def set_setting(url: str, name: str, value: object) -> None:
    request = urllib.request.Request(
        f"{url}/settings/{name}", json.dumps(value).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=20).close()


def open_page(
    browser: Browser, url: str, *, nodes2: bool, query: str = "", size=(1600, 1000), beside: Page | None = None
) -> Page:
    """The page in the classic renderer or in Nodes 2.0, without the first-start template browser over the canvas; as
    another person's browser opens it, or in a tab `beside` a page that is open."""
    set_setting(url, "Comfy.TutorialCompleted", True)
    set_setting(url, "Comfy.VueNodes.Enabled", nodes2)
    person = beside.context if beside else browser.new_context(viewport={"width": size[0], "height": size[1]})
    page = person.new_page()
    page.set_default_timeout(90_000)
    page.goto(url + query)
    page.wait_for_function(READY)
    page.wait_for_function("() => app.vueAppReady && !document.querySelector('.p-blockui-mask')")
    return page


def build_graph(page: Page, nodes: list[dict], groups: list[dict] | None = None) -> list[int]:
    """Nodes as {type, values, links, box?, title?}, links as {input: (index of the source, output)} -> node ids."""
    nodes = [{"values": {}, "links": {}} | node for node in nodes]
    return page.evaluate(BUILD, {"nodes": nodes, "groups": groups or []})


def run_workflow(page: Page, seconds: int = 120) -> None:
    """Queue the graph as the Run button does and wait for its end; an error of any node, or a refusal, is raised."""
    page.evaluate(RUN, seconds)


def open_at_template(open_at, pack: str, name: str) -> Page:
    """The page with a template of a pack, opened as a link to it does."""
    page = open_at(f"?template={name}&source={pack}")
    page.wait_for_function("() => app.graph.nodes.some((node) => node.type === 'SodaPlayground')")
    return page


def set_widgets(page: Page, values: dict[str, dict]) -> None:
    """Sets widgets of all nodes of a type: {type: {widget: value}}."""
    page.evaluate(
        """(values) => app.graph.nodes.forEach((node) => Object.entries(values[node.type] ?? {}).forEach(
          ([name, value]) => { node.widgets.find((widget) => widget.name === name).value = value }))""",
        values,
    )


def boxes(page: Page) -> dict[str, list[float]]:
    """Where each node is drawn now, title bar and all: {id type: [left, top, right, bottom]} in screen pixels."""
    return page.evaluate(
        """() => Object.fromEntries(app.graph.nodes.map((node) => {
          const element = LiteGraph.vueNodesMode && document.querySelector(`[data-node-id="${node.id}"]`)
          if (element) {
            const {left, top, right, bottom} = element.getBoundingClientRect()
            return [`${node.id} ${node.type}`, [left, top, right, bottom]]
          }
          const [x, y, width, height] = node.boundingRect
          const [left, top] = app.canvas.ds.convertOffsetToCanvas([x, y]), scale = app.canvas.ds.scale
          return [`${node.id} ${node.type}`, [left, top, left + width * scale, top + height * scale]]
        }))"""
    )


def widget_values(page: Page, type_: str) -> dict[str, object]:
    """The widgets of the first node of a type by name, in their order."""
    return page.evaluate(
        """(type) => Object.fromEntries(app.graph.nodes.find((node) => node.type === type).widgets
          .filter((widget) => widget.serialize !== false).map((widget) => [widget.name, widget.value]))""",
        type_,
    )


def choices(page: Page, type_: str, name: str) -> list[str]:
    """What a combo widget of the first node of a type offers."""
    return page.evaluate(
        """([type, name]) => { const node = app.graph.nodes.find((node) => node.type === type)
          const {values} = node.widgets.find((widget) => widget.name === name).options
          return [...(typeof values === 'function' ? values() : values)] }""",
        [type_, name],
    )


def choose(page: Page, type_: str, name: str, value: str) -> None:
    """Picks a value of a combo widget with the mouse, as a person does."""
    node, label, x, y = page.evaluate(
        """([type, name]) => {
          const node = app.graph.nodes.find((node) => node.type === type)
          const widget = node.widgets.find((widget) => widget.name === name)
          const middle = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.y + 10]
          const [x, y] = app.canvas.ds.convertOffsetToCanvas(middle)
          const {left, top} = app.canvas.canvas.getBoundingClientRect()
          return [node.id, widget.label ?? widget.name, x + left, y + top]
        }""",
        [type_, name],
    )
    if page.evaluate("LiteGraph.vueNodesMode"):
        page.locator(f'[data-node-id="{node}"]').get_by_role("combobox", name=label, exact=True).click()
        page.get_by_role("option", name=value, exact=True).click()
    else:
        entry = page.locator(".litecontextmenu .litemenu-entry").get_by_text(value, exact=True)
        for _ in range(5):  # a busy page loses a click
            page.wait_for_timeout(400)  # the canvas takes a second click nearby within 300 ms for a double click
            page.mouse.click(x, y)
            with suppress(PlaywrightTimeout):
                entry.wait_for(timeout=5000)
                break
        entry.click()
