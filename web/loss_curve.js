/*
 * The loss curve of a training as an SVG: every loss faint, the smoothed loss strong, a mark at each sample.
 *
 * Points are [step, loss, smoothed loss]. The losses' axis spans what the middle 96 % of them and the smoothed line
 * need, since single losses of a diffusion model stray far; it is logarithmic where that is a factor of 10 or more.
 */
const NAMESPACE = "http://www.w3.org/2000/svg"
const LEFT = 56
const RIGHT = 8
const TOP = 8
const BOTTOM = 20
const LOG_FROM = 10

function add(parent, name, attributes, text) {
  const element = document.createElementNS(NAMESPACE, name)
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value)
  if (text !== undefined) element.textContent = text
  parent.append(element)
  return element
}

/** A number with at most three digits that count. */
function short(value) {
  return Math.abs(value) >= 1e-3 || value === 0 ? String(Number(value.toPrecision(3))) : value.toExponential(1)
}

/** At most `most` round numbers between low and high. */
function roundNumbers(low, high, most) {
  const power = 10 ** Math.floor(Math.log10((high - low) / most))
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => (high - low) / size <= most)
  const numbers = []
  for (let number = Math.ceil(low / step); number <= high / step; number++) numbers.push(number * step)
  return numbers
}

/** Numbers 1, 2, 5 times powers of ten between low and high; over a wide range the powers alone. */
function logNumbers(low, high) {
  const powers = []
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) powers.push(power)
  const factors = powers.length > 3 ? [1] : [1, 2, 5]
  const numbers = powers.flatMap((power) => factors.map((factor) => Number(`${factor}e${power}`)))
  return numbers.filter((number) => number >= low && number <= high)
}

function range(points) {
  const losses = points.map(([, loss]) => loss).sort((a, b) => a - b)
  const smoothed = points.map(([, , value]) => value)
  const inner = (share) => losses[Math.round(share * (losses.length - 1))]
  const low = Math.min(inner(0.02), ...smoothed)
  const high = Math.max(inner(0.98), ...smoothed)
  const log = low > 0 && high / low >= LOG_FROM
  const margin = log ? (high / low) ** 0.05 : Math.max((high - low) * 0.05, Math.abs(high) * 0.01) || 1
  return log ? { low: low / margin, high: high * margin, log } : { low: low - margin, high: high + margin, log }
}

/** Redraw `svg`, whose size is width × height pixels. `colours` are CSS colours {line, faint, text, grid, mark}. */
export function drawCurve(svg, points, samples, width, height, colours) {
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`)
  svg.replaceChildren()
  if (points.length === 0 || width < LEFT + RIGHT + 20 || height < TOP + BOTTOM + 20) return
  const bottom = height - BOTTOM
  const first = points[0][0]
  const last = points.at(-1)[0]
  const { low, high, log } = range(points)
  const scale = log ? Math.log : (value) => value
  const x = (step) => LEFT + ((width - LEFT - RIGHT) * (step - first)) / Math.max(1, last - first)
  const y = (loss) => {
    const share = (scale(Math.min(high, Math.max(low, loss))) - scale(low)) / (scale(high) - scale(low))
    return bottom - (bottom - TOP) * share
  }
  const label = { fill: colours.text, "font-size": 10, "font-family": "sans-serif" }

  for (const loss of log ? logNumbers(low, high) : roundNumbers(low, high, 4)) {
    add(svg, "line", { x1: LEFT, x2: width - RIGHT, y1: y(loss), y2: y(loss), stroke: colours.grid })
    add(svg, "text", { ...label, x: LEFT - 4, y: y(loss) + 3, "text-anchor": "end" }, short(loss))
  }
  const stepTicks = roundNumbers(first, Math.max(last, first + 1), Math.max(2, Math.floor(width / 90)))
  for (const step of stepTicks.filter((step) => Number.isInteger(step) && x(step) < width - 36)) {
    add(svg, "text", { ...label, x: x(step), y: height - 6, "text-anchor": "middle" }, step)
  }
  add(svg, "text", { ...label, x: width - RIGHT, y: height - 6, "text-anchor": "end" }, "step")
  add(svg, "text", { ...label, x: 10, y: (TOP + bottom) / 2, "text-anchor": "middle",
    transform: `rotate(-90 10 ${(TOP + bottom) / 2})` }, log ? "loss (log)" : "loss")

  for (const step of samples.filter((step) => step >= first && step <= last)) {
    const mark = add(svg, "g", { class: "soda-sample" })
    add(mark, "line", { x1: x(step), x2: x(step), y1: TOP, y2: bottom, stroke: colours.mark, "stroke-dasharray": "2 3" })
    add(mark, "circle", { cx: x(step), cy: TOP, r: 3, fill: colours.mark })
    add(mark, "title", {}, `sample after step ${step}`)
  }
  const path = (column) => points.map((point) => `${x(point[0]).toFixed(1)},${y(point[column]).toFixed(1)}`).join(" ")
  const line = { fill: "none", "stroke-linejoin": "round" }
  add(svg, "polyline", { ...line, class: "soda-losses", points: path(1), stroke: colours.faint, "stroke-width": 1 })
  add(svg, "polyline", { ...line, class: "soda-smoothed", points: path(2), stroke: colours.line, "stroke-width": 2 })
  if (points.length === 1) add(svg, "circle", { cx: x(first), cy: y(points[0][2]), r: 3, fill: colours.line })
}
