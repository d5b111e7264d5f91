/*
 * Settings > SODA: how much room the bases of models may take. ComfyUI keeps the values on the server
 * (comfy.settings.json), where soda/hosts/comfy/settings.py reads them whenever an adapter is applied.
 */
import { app } from "../../scripts/app.js"

const room = (id, name, defaultValue, tooltip) => ({
  id,
  name,
  category: ["SODA", "Bases of models", name],
  type: "number",
  attrs: { min: 0, max: 1000, step: 0.5, minFractionDigits: 0, maxFractionDigits: 1 },
  defaultValue,
  tooltip,
})

app.registerExtension({
  name: "soda.settings",
  settings: [
    room(
      "SODA.basesInMemory",
      "Kept in memory (GB)",
      6,
      "RAM for the bases of models to which SODA adapters were applied, so that a changed strength costs no " +
        "decomposition. SDXL takes 1.9 GB (lq) or 3.6 GB (svd). 0 keeps none: every load of a model computes them anew.",
    ),
    room(
      "SODA.basesOnDisk",
      "Kept on disk (GB)",
      8,
      "Room for bases in user/soda/bases, so that a restart costs no decomposition. Those longest unused go first. " +
        "0 keeps none and removes what is there when an adapter is applied next.",
    ),
  ],
})
