/*
 * Adapter lists that follow the files.
 *
 * The server lists adapter files afresh whenever it is asked, but a page asks once, when it opens. So after
 * SODA Save wrote a file this extension has the page ask again, as its "Refresh Node Definitions" command does.
 * That command renews the top-level lists of every node and leaves the lists inside a dynamic row (those of
 * SODA Mix) as they were when the page opened; these read the newest list here.
 */
import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"

let adapterNames = []

function followAdapterNames(widget) {
  if (widget.name.endsWith(".adapter_name")) widget.options.values = () => adapterNames
  return widget
}

app.registerExtension({
  name: "soda.adapterLists",

  setup() {
    api.addEventListener("executed", ({ detail }) => {
      if (!detail.output?.soda_adapters) return
      const refresh = app.reloadNodeDefs ?? app.refreshComboInNodes
      refresh.call(app).catch((error) => console.error("SODA: the adapter lists were not refreshed:", error))
    })
  },

  beforeRegisterNodeDef(_nodeType, nodeData) {
    if (nodeData.name !== "SodaMix") return
    const { inputs } = nodeData.input.required.row[1].options.find(({ key }) => key === "adapter")
    adapterNames = inputs.required.adapter_name[1].options
  },

  nodeCreated(node) {
    if (node.comfyClass !== "SodaMix") return
    node.widgets?.forEach(followAdapterNames)
    const addCustomWidget = node.addCustomWidget
    node.addCustomWidget = function (widget) {
      return followAdapterNames(addCustomWidget.call(this, widget))
    }
  },
})
