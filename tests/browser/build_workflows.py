"""Write the example workflows and their thumbnails with the real page.

    python tests/browser/build_workflows.py http://127.0.0.1:8188 [name ...]

Each workflow is described below as nodes, values and links; ComfyUI's page builds it, runs it, and serialises it.
Run it again after a node's inputs changed. The server must have this pack, the folder input/my_photos with photos
and captions (workflow 4), and an otherwise empty output folder; the browser is found as in the tests.
"""

from __future__ import annotations

import argparse
import io
import json
import uuid
from pathlib import Path

from comfy_page import build_graph, open_browser, open_page, run_workflow
from PIL import Image
from playwright.sync_api import Page

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"

SAMPLING = {
    "seed": 7, "control_after_generate": "fixed", "steps": 20, "cfg": 3.0, "sampler_name": "euler",
    "scheduler": "normal", "denoise": 1.0,
}  # fmt: skip
STEPS = 200
SUBJECT_FILE, STYLE_FILE = "soda_subject.safetensors", "soda_style.safetensors"
SUBJECT_PROMPT = "a sks monster on a gray background"
MIX_PROMPT = "a sks monster on a gray background, ohwx style"
PHOTOS_PROMPT = "a photo of sks dog"
GROUPS = {"blue": "#3f789e", "green": "#88aa88", "purple": "#9a6fb0", "brown": "#b58b2a"}
WIDTH = 1480
ADAPTER, LOSS, WIRED = "adapter", "loss_map", "adapters.adapter0"

LOAD_NOTE = """# Load one adapter
**SODA Playground** is a tiny drawing model that comes with this pack, so this workflow runs on any machine, without a
download. Put your own checkpoint loader in its place for real work.

**SODA Loader** applies one adapter file. Try strength 0 (exactly the model without it), 0.5, 1.5, or -1.
The text on the node tells how many layers it changed."""

MIX_NOTE = """# Mix a subject and a style
**SODA Mix** adds the rotations of both adapters in their Lie algebra: the result is again one adapter of the same
size, in any order the same to the last bit. Set a row to *adapter*, pick its file, and the next row appears.

Change the weights (0 to 1.5) to move between subject and style; weight 0 leaves an adapter out.

An adapter that is not a file yet, straight from SODA Train or SODA Save, goes into **adapter0**; a row with the file
*(wired)* gives it its weight. Wire the **adapter** output to SODA Save to keep the mix as one file."""

TRAIN_NOTE = """# Train, save and use an adapter in one graph
1. **SODA Playground Drawings** gives captioned drawings of an invented creature, *pom*. For a drawing style set
*concept* to *comic* and *role* to style (prompt: a green triangle on a gray background, ohwx style).
2. **Make Training Dataset** (ComfyUI's own) encodes them; **SODA Train** learns. Step, loss and time left stand on the
node; a few minutes on a CPU.
3. **SODA Save** writes **output/loras/soda/my_subject_00001_.safetensors** and passes on what it reads back.
4. The same prompt and noise before and after. From now on the file is in the lists of SODA Loader and SODA Mix."""

PHOTOS_NOTE = """# Train on a folder of photos
1. Make a folder **my_photos** in ComfyUI's **input** folder: 4 to 20 photos of one subject, and beside each a text file
of the same name with its caption (dog1.jpg, dog1.txt: *a photo of sks dog*). Reload the page and pick it in
**Load Image-Text (from Folder)**.
2. Photos are cut to the model's size, 64 px here because the playground is that small. With SD 1.5 use 512, with SDXL
1024, and your checkpoint in place of **SODA Playground**.
3. Run. The playground never saw a photo: expect colours and rough shapes from it, not a portrait."""

CONVERT_NOTE = """# Save a mix as an ordinary LoRA
For tools and people without this pack. **SODA Convert** computes what the adapter changes on the model it was trained
on, saves that as **output/loras/my_mix_00001_.safetensors** and says on the node how much of it the rank keeps; the
*full difference* keeps everything and is as large as the adapted weights.

**Load LoRA Model** (ComfyUI's own) uses it at once. Try rank 4, and compare.

For another checkpoint than the adapter's own there is **SODA Transport** (model: the old one, new_model: the new one).
In other packs' LoRA stacks, SODA files in *output/loras/soda* go by **SODA Stack**."""


class Workflow:
    """A graph as data: `node` adds one and returns a function from output name to a link into another node's input."""

    def __init__(self, name: str, focus: list[str]):
        self.name, self.focus = name, focus
        self.nodes: list[dict] = []
        self.groups: list[dict] = []

    def node(self, type_: str, box: tuple[int, int, int, int], title: str = "", /, **inputs):
        """`box` is left, top, width, height of the body below the title bar; inputs are widget values or links."""
        index = len(self.nodes)
        links = {k: v for k, v in inputs.items() if isinstance(v, tuple)}
        values = {k: v for k, v in inputs.items() if not isinstance(v, tuple)}
        self.nodes.append({"type": type_, "box": box, "title": title, "values": values, "links": links})
        return lambda output: (index, output)

    def note(self, box: tuple[int, int, int, int], title: str, text: str) -> None:
        self.node("MarkdownNote", box, title, text=text)

    def group(self, title: str, color: str, box: tuple[int, int, int, int]) -> None:
        self.groups.append({"title": title, "color": GROUPS[color], "box": box})


def rows(*parts: dict) -> dict:
    """SODA Mix's chained rows as widget values, in the order in which the widgets appear."""
    values, row = {}, "row"
    for number, part in enumerate(parts, start=1):
        values |= {row: "adapter"} | {f"{row}.{name}": value for name, value in part.items()}
        row = f"{row}.row{number + 1}"
    return values


def sampling(w: Workflow, top: int, title: str, clip, vae, prompt: str, models: dict[str, tuple]) -> None:
    """The stock chain: one prompt and noise, then KSampler, decode and preview for each of two models."""
    y = top + 80
    positive = w.node("CLIPTextEncode", (20, y, 290, 120), "Prompt", text=prompt, clip=clip)
    negative = w.node("CLIPTextEncode", (20, y + 180, 290, 90), "Negative prompt (empty)", text="", clip=clip)
    latent = w.node("EmptyLatentImage", (20, y + 330, 290, 110), width=64, height=64, batch_size=4)
    for column, (name, model) in enumerate(models.items()):
        x = 350 + column * 570
        sampled = w.node(
            "KSampler", (x, y, 260, 290), name, **SAMPLING, model=model, positive=positive("CONDITIONING"),
            negative=negative("CONDITIONING"), latent_image=latent("LATENT"),
        )  # fmt: skip
        image = w.node("VAEDecode", (x, y + 350, 260, 80), samples=sampled("LATENT"), vae=vae)
        large = w.node(
            "ImageScaleBy", (x, y + 490, 260, 100), "Enlarge to see it", image=image("IMAGE"),
            upscale_method="nearest-exact", scale_by=4.0,
        )  # fmt: skip
        w.node("PreviewImage", (x + 280, y, 260, 590), name, images=large("IMAGE"))
    w.group(title, "purple", (0, top, WIDTH, 700))


def load_one() -> Workflow:
    w = Workflow("soda_1_load_one_adapter", ["SodaLoader", "PreviewImage"])
    w.note((0, 30, 700, 240), "Read me", LOAD_NOTE)
    base = w.node("SodaPlayground", (740, 70, 300, 90))
    loader = w.node(
        "SodaLoader", (1120, 70, 340, 190), adapter_name=SUBJECT_FILE, strength=1.0, model=base("MODEL"),
        clip=base("CLIP"),
    )  # fmt: skip
    w.group("1. Model", "blue", (720, 0, 340, 300))
    w.group("2. SODA adapter", "green", (1100, 0, 380, 300))
    models = {"Without the adapter": base("MODEL"), "With the adapter": loader("MODEL")}
    sampling(w, 340, "3. Sample, twice with the same seed", loader("CLIP"), base("VAE"), SUBJECT_PROMPT, models)
    return w


def two_as_one(w: Workflow, left: int, mix_left: int) -> tuple:
    """The playground and both shipped adapters as one on it, in a group each -> (model, mix)."""
    base = w.node("SodaPlayground", (left + 20, 70, mix_left - left - 80, 90))
    mix = w.node(
        "SodaMix", (mix_left + 20, 70, 340, 430),
        **rows({"adapter_name": SUBJECT_FILE, "weight": 1.2}, {"adapter_name": STYLE_FILE, "weight": 1.0}),
        model=base("MODEL"), clip=base("CLIP"),
    )  # fmt: skip
    w.group("1. Model", "blue", (left, 0, mix_left - left - 40, 540))
    w.group("2. Two SODA adapters as one", "green", (mix_left, 0, 380, 540))
    return base, mix


def mix_two() -> Workflow:
    w = Workflow("soda_2_mix_two_adapters", ["SodaMix", "PreviewImage"])
    w.note((0, 30, 700, 300), "Read me", MIX_NOTE)
    base, mix = two_as_one(w, 720, 1100)
    models = {"Without the adapters": base("MODEL"), "Subject and style": mix("MODEL")}
    sampling(w, 580, "3. Sample, twice with the same seed", mix("CLIP"), base("VAE"), MIX_PROMPT, models)
    return w


def train(w: Workflow, base, images: tuple, texts: tuple, prefix: str, words: str, prompt: str, **settings) -> None:
    """Dataset, training, saving and sampling with the file just saved, right of the first group."""
    data = w.node(
        "MakeTrainingDataset", (380, 310, 280, 110), images=images, texts=texts, vae=base("VAE"), clip=base("CLIP")
    )
    trained = w.node(
        "SodaTrain", (700, 310, 360, 810), **settings, model=base("MODEL"), latents=data("latents"),
        positive=data("conditioning"),
    )  # fmt: skip
    w.node("LossGraphNode", (380, 490, 280, 360), loss=trained(LOSS), filename_prefix="soda_loss")
    saved = w.node(
        "SodaSave", (1140, 310, 320, 190), adapter=trained(ADAPTER), filename_prefix=prefix, trigger_words=words
    )
    mix = w.node("SodaMix", (1140, 570, 320, 280), model=base("MODEL"), clip=base("CLIP"),
                 **rows({"adapter_name": "(wired)", "weight": 1.0}), **{WIRED: saved(ADAPTER)})  # fmt: skip
    models = {"Before training": base("MODEL"), "After training": mix("MODEL")}
    w.group("2. Train", "green", (360, 240, 720, 900))
    w.group("3. Save, and use the saved file", "brown", (1120, 240, 360, 900))
    sampling(w, 1180, "4. Sample, twice with the same seed", base("CLIP"), base("VAE"), prompt, models)


def train_and_use() -> Workflow:
    w = Workflow("soda_3_train_and_use", ["SodaTrain", "SodaSave", "SodaMix", "PreviewImage", "KSampler"])
    w.note((0, 0, WIDTH, 200), "Read me", TRAIN_NOTE)
    base = w.node("SodaPlayground", (20, 310, 280, 90))
    drawings = w.node("SodaPlaygroundDrawings", (20, 460, 280, 90), concept="pom")
    w.node("PreviewImage", (20, 610, 280, 240), "The drawings", images=drawings("images"))
    w.group("1. Model and drawings", "blue", (0, 240, 320, 900))
    images, texts = drawings("images"), drawings("texts")
    train(w, base, images, texts, "my_subject", "sks monster", SUBJECT_PROMPT, steps=STEPS, role="subject")
    return w


def train_on_photos() -> Workflow:
    w = Workflow(
        "soda_4_train_on_photos", ["SodaPlayground", "SodaTrain", "SodaSave", "SodaMix", "PreviewImage", "KSampler"]
    )
    w.note((0, 0, WIDTH, 200), "Read me", PHOTOS_NOTE)
    base = w.node("SodaPlayground", (20, 310, 280, 90))
    photos = w.node("LoadImageTextDataSetFromFolder", (20, 460, 280, 100), folder="my_photos")
    small = w.node(
        "ImageScale", (20, 630, 280, 160), "Resize to the model's size", image=photos("images"),
        upscale_method="area", width=64, height=64, crop="center",
    )  # fmt: skip
    w.group("1. Model and photos", "blue", (0, 240, 320, 900))
    train(w, base, small("IMAGE"), photos("texts"), "my_photos", "sks dog", PHOTOS_PROMPT, steps=STEPS, role="subject")
    return w


def save_as_lora() -> Workflow:
    w = Workflow("soda_5_save_as_lora", ["SodaConvert", "PreviewImage"])
    w.note((0, 30, 320, 460), "Read me", CONVERT_NOTE)
    base, mix = two_as_one(w, 340, 700)
    converted = w.node(
        "SodaConvert", (1120, 70, 340, 230), **{"to": "LoRA", "to.rank": 32}, filename_prefix="my_mix",
        model=base("MODEL"), adapter=mix(ADAPTER),
    )  # fmt: skip
    lora = w.node(
        "LoraModelLoader", (1120, 370, 340, 130), strength_model=1.0, model=base("MODEL"), lora=converted("lora")
    )
    w.group("3. As a LoRA", "brown", (1100, 0, 380, 540))
    models = {"The SODA mix": mix("MODEL"), "The LoRA made of it": lora("model")}
    sampling(w, 580, "4. Sample, twice with the same seed", base("CLIP"), base("VAE"), MIX_PROMPT, models)
    return w


WORKFLOWS = [load_one, mix_two, train_and_use, train_on_photos, save_as_lora]
FIT = """(types) => { const nodes = app.graph.nodes.filter((n) => types.length === 0 || types.includes(n.type))
  const boxes = nodes.map((n) => { n.updateArea?.(); return n.boundingRect })
  const left = Math.min(...boxes.map((b) => b[0])), top = Math.min(...boxes.map((b) => b[1]))
  const right = Math.max(...boxes.map((b) => b[0] + b[2])), bottom = Math.max(...boxes.map((b) => b[1] + b[3]))
  app.canvas.ds.fitToBounds([left, top, right - left, bottom - top], {zoom: 0.92}); app.canvas.setDirty(true, true) }"""


def thumbnail(page: Page, types: list[str]) -> bytes:
    """A JPEG of the canvas around the nodes of these types, as the template browser shows it."""
    for name in ("Comfy.Minimap.Visible", "Comfy.Graph.CanvasInfo", "Comfy.Graph.CanvasMenu"):
        page.evaluate("(name) => app.extensionManager.setting.set(name, false)", name)
    page.evaluate("app.extensionManager.command.execute('Workspace.ToggleFocusMode')")
    page.evaluate(FIT, types)
    page.wait_for_timeout(1500)
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.thumbnail((640, 640))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88)
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--no-run", action="store_true", help="thumbnails of the graph alone, without pictures")
    args = parser.parse_args()
    with open_browser() as browser:
        for workflow in (make() for make in WORKFLOWS):
            if args.names and workflow.name not in args.names:
                continue
            page = open_page(browser, args.url, nodes2=False, size=(1100, 1100))
            build_graph(page, workflow.nodes, workflow.groups)
            page.evaluate(FIT, [])
            graph = json.loads(page.evaluate("JSON.stringify(app.graph.serialize())"))
            graph["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, workflow.name))  # the page makes a new one each time
            (FOLDER / f"{workflow.name}.json").write_text(json.dumps(graph, indent=1) + "\n", encoding="utf-8")
            if not args.no_run:
                run_workflow(page, 3600)
            (FOLDER / f"{workflow.name}.jpg").write_bytes(thumbnail(page, workflow.focus))
            page.close()
            print(workflow.name)


if __name__ == "__main__":
    main()
