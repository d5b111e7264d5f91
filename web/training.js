/*
 * Watching and stopping SODA Train: the live loss curve and the button "Stop and keep" on the node.
 *
 * The server tells every page of each training with the event "soda.training", whose points continue those told
 * before; a page that opens later, or missed an event, asks for all of them. A node gets the widget when it first
 * trains; nothing of it is saved with the workflow.
 */
import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { drawCurve } from "./loss_curve.js"

const EVENT = "soda.training"
const WIDGET = "soda_training"
const HEIGHT = 170 // pixels at least: a line of text with the button, and the curve
const STATES = {
  running: (t) => (t.done ? progress(t) : "preparing…"),
  stopping: () => "stopping after this step…",
  finished: (t) => `${t.done} steps, loss ${loss(t)}`,
  stopped: (t) => `stopped and kept after ${t.done} of ${t.steps} steps, loss ${loss(t)}`,
  cancelled: (t) => `cancelled after ${t.done} of ${t.steps} steps`,
  failed: (t) => `failed after ${t.done} of ${t.steps} steps`,
}

const trainings = new Map() // by workflow and node, as the server tells them, with all points

const keyOf = (training) => `${training.workflow} ${training.node}`
const isOn = (training) => training.state === "running" || training.state === "stopping"
const loss = (training) => (training.loss === null ? "–" : training.loss.toPrecision(3))

function progress(training) {
  const left = training.left === null ? "" : ` · ${duration(training.left)} left`
  return `step ${training.done}/${training.steps} · loss ${loss(training)}${left}`
}

function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds))
  if (whole < 60) return `${whole} s`
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`
}

/** The node of an id as the server knows it: "12:3" is node 3 of the subgraph in node 12. */
function findNode(id) {
  const path = id.split(":")
  const last = path.pop()
  const graph = path.reduce((graph, step) => graph?.getNodeById(step)?.subgraph, app.rootGraph ?? app.graph)
  return graph?.getNodeById(last)
}

/** Whether the training belongs to the workflow that is open; one queued without a page belongs to any. */
function isHere(training) {
  return training.workflow === null || training.workflow === (app.rootGraph ?? app.graph).id
}

function show(training) {
  if (!isHere(training)) return
  const node = findNode(training.node)
  if (node?.comfyClass !== "SodaTrain") return
  const widget = node.widgets.find((widget) => widget.name === WIDGET) ?? addWidget(node)
  widget.show(training)
}

function showAll() {
  trainings.forEach(show)
}

function askForAll() {
  return api
    .fetchApi("/soda/training")
    .then((answer) => answer.json())
    .then((all) => {
      for (const training of all.trainings) {
        const known = trainings.get(keyOf(training))
        const newer = known?.prompt === training.prompt && known.done > training.done
        if (!newer) trainings.set(keyOf(training), training)
      }
      showAll()
    })
    .catch((error) => console.error("SODA: the trainings on the server are unknown:", error))
}

function continueWith(news) {
  const known = trainings.get(keyOf(news))
  const before = known?.prompt === news.prompt ? known.points : []
  const kept = before.filter(([step]) => step <= news.since && step % news.stride === 0)
  if ((kept.at(-1)?.[0] ?? 0) !== news.since) return askForAll()
  const training = { ...news, points: [...kept, ...news.points] }
  trainings.set(keyOf(news), training)
  show(training)
}

/** On the classic canvas the last sample shown on the way hides the strip of all samples that the node ends with. */
function showStrip(id) {
  const node = findNode(id)
  if (node?.comfyClass !== "SodaTrain") return
  delete app.nodePreviewImages[node.graph.isRootGraph ? node.id : `${node.graph.id}:${node.id}`]
  node.setDirtyCanvas(true)
}

async function stop(training) {
  const body = JSON.stringify({ node: training.node, prompt: training.prompt })
  const answer = await api.fetchApi("/soda/training/stop", { method: "POST", body })
  if (answer.ok) return
  const { error } = await answer.json()
  app.extensionManager.toast.add({ severity: "warn", summary: "Nothing was stopped", detail: error, life: 5000 })
  await askForAll()
}

function colours(element) {
  const style = getComputedStyle(element)
  const text = style.getPropertyValue("--input-text") || "#ddd"
  return { line: "#4c9aff", faint: "rgba(76, 154, 255, 0.35)", mark: "#f0a04b", text,
    grid: "rgba(128, 128, 128, 0.25)" }
}

function addWidget(node) {
  const element = document.createElement("div")
  element.className = "soda-training"
  element.style.cssText = `display: flex; flex-direction: column; gap: 4px; min-height: ${HEIGHT}px; font-size: 12px;
    color: var(--input-text); background: var(--comfy-input-bg); border-radius: 8px; padding: 6px; box-sizing: border-box`
  const head = document.createElement("div")
  head.style.cssText = "display: flex; align-items: center; gap: 6px; flex: none"
  const text = document.createElement("span")
  text.className = "soda-training-text"
  text.style.cssText = "flex: 1; min-width: 0"
  const button = document.createElement("button")
  button.type = "button"
  button.textContent = "Stop and keep"
  button.title = "End training after the current step; the graph goes on with the adapter as it is."
  button.style.cssText = "flex: none; padding: 3px 8px; border-radius: 6px; border: 1px solid var(--border-color); " +
    "color: inherit; background: var(--comfy-menu-bg); font: inherit"
  const frame = document.createElement("div") // the drawing must not widen what it is measured by
  frame.style.cssText = "flex: 1; position: relative; min-height: 0"
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg")
  svg.setAttribute("role", "img")
  svg.setAttribute("aria-label", "loss curve")
  svg.style.cssText = "position: absolute; inset: 0; width: 100%; height: 100%"
  frame.append(svg)
  head.append(text, button)
  element.append(head, frame)

  let shown = null
  const draw = () => {
    if (!shown) return
    drawCurve(svg, shown.points, shown.samples, frame.clientWidth, frame.clientHeight, colours(element))
  }
  const observer = new ResizeObserver(draw)
  observer.observe(frame)
  button.addEventListener("click", () => stop(shown).catch((error) => console.error("SODA: not stopped:", error)))
  element.addEventListener("wheel", (event) => LiteGraph.vueNodesMode || app.canvas.processMouseWheel(event))

  const widget = node.addDOMWidget(WIDGET, WIDGET, element, { serialize: false, hideOnZoom: false, margin: 4,
    getMinHeight: () => HEIGHT + 8 })
  widget.serialize = false
  widget.label = "training"
  widget.show = (training) => {
    shown = training
    text.textContent = STATES[training.state](training)
    button.disabled = training.state !== "running"
    button.style.opacity = button.disabled ? 0.4 : 1
    button.style.cursor = button.disabled ? "default" : "pointer"
    draw()
  }
  const removed = widget.onRemove
  widget.onRemove = function () {
    observer.disconnect()
    removed?.call(this)
  }
  const [width, height] = node.computeSize()
  node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])])
  return widget
}

app.registerExtension({
  name: EVENT,

  setup() {
    api.addEventListener(EVENT, ({ detail }) => continueWith(detail))
    api.addEventListener("executed", ({ detail }) => detail.output?.images && showStrip(detail.display_node))
    api.addEventListener("reconnected", askForAll)
    askForAll()
  },

  afterConfigureGraph() {
    showAll()
  },
})
