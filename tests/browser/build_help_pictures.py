"""Draw the pictures of SODA Train's help page: the same training too short, as it should be, and too fast.

    python tests/browser/build_help_pictures.py http://127.0.0.1:8188 [case ...]

Each training runs in the real page. A picture shows, from left to right, the loss curve on the node, samples of what
was taught, and samples of a prompt that has nothing to do with it.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from build_workflows import SAMPLING, SUBJECT_PROMPT, WIRED, Workflow, rows
from comfy_page import build_graph, open_browser, open_page, run_workflow
from PIL import Image
from playwright.sync_api import Page

FOLDER = Path(__file__).resolve().parents[2] / "web" / "docs"
OTHER_PROMPT = "a green triangle on a gray background"
CASES = {
    "train_under": {"steps": 10, "learning_rate": 0.015},
    "train_right": {"steps": 100, "learning_rate": 0.015},
    "train_over": {"steps": 60, "learning_rate": 0.12},
}
CURVE, SAMPLE, GAP = (320, 170), 85, 8  # pixels


def graph(**settings) -> Workflow:
    w = Workflow("help", [])
    base = w.node("SodaPlayground", (0, 0, 240, 90))
    drawings = w.node("SodaPlaygroundDrawings", (0, 160, 240, 90), concept="pom")
    data = w.node("MakeTrainingDataset", (0, 320, 240, 110), images=drawings("images"), texts=drawings("texts"),
                  vae=base("VAE"), clip=base("CLIP"))  # fmt: skip
    trained = w.node("SodaTrain", (300, 0, CURVE[0] + 16, 760), **settings, role="subject", targets="cross-attention",
                     model=base("MODEL"), latents=data("latents"), positive=data("conditioning"))  # fmt: skip
    mix = w.node("SodaMix", (700, 0, 320, 280), model=base("MODEL"),
                 **rows({"adapter_name": "(wired)", "weight": 1.0}), **{WIRED: trained("adapter")})  # fmt: skip
    negative = w.node("CLIPTextEncode", (0, 500, 240, 90), text="", clip=base("CLIP"))
    latent = w.node("EmptyLatentImage", (0, 650, 240, 110), width=64, height=64, batch_size=4)
    for row, prompt in enumerate((SUBJECT_PROMPT, OTHER_PROMPT)):
        positive = w.node("CLIPTextEncode", (700, 340 + 200 * row, 240, 90), text=prompt, clip=base("CLIP"))
        sampled = w.node("KSampler", (1060, 340 * row, 240, 290), **SAMPLING, model=mix("MODEL"),
                         positive=positive("CONDITIONING"), negative=negative("CONDITIONING"),
                         latent_image=latent("LATENT"))  # fmt: skip
        image = w.node("VAEDecode", (1340, 340 * row, 200, 80), samples=sampled("LATENT"), vae=base("VAE"))
        w.node("PreviewImage", (1580, 340 * row, 260, 300), images=image("IMAGE"))
    return w


def samples(page: Page) -> list[list[Image.Image]]:
    """The pictures of each Preview Image in the order of the prompts."""
    outputs = page.evaluate("""() => app.graph.nodes.filter((n) => n.type === "PreviewImage").map((n) =>
      app.nodeOutputs[n.id].images.map((i) => app.api.apiURL("/view?" + new URLSearchParams(i))))""")
    origin = page.evaluate("location.origin")
    return [[Image.open(io.BytesIO(page.request.get(origin + url).body())) for url in urls] for urls in outputs]


def picture(page: Page) -> Image.Image:
    page.evaluate("app.canvas.ds.offset = [-180, 60]; app.canvas.ds.scale = 1; app.canvas.setDirty(true, true)")
    page.wait_for_timeout(1500)
    curve = Image.open(io.BytesIO(page.locator(".soda-training").screenshot())).convert("RGB").resize(CURVE)
    whole = Image.new("RGB", (CURVE[0] + 2 * (2 * SAMPLE + GAP), CURVE[1]), "white")
    whole.paste(curve, (0, 0))
    for group, images in enumerate(samples(page)):
        for i, image in enumerate(images):
            place = CURVE[0] + GAP + group * (2 * SAMPLE + GAP) + i % 2 * SAMPLE, i // 2 * SAMPLE
            whole.paste(image.convert("RGB").resize((SAMPLE, SAMPLE), Image.Resampling.NEAREST), place)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("cases", nargs="*", metavar="case")
    args = parser.parse_args()
    with open_browser() as browser:
        for name in args.cases or CASES:
            page = open_page(browser, args.url, nodes2=False)
            build_graph(page, graph(**CASES[name]).nodes)
            run_workflow(page, 3600)
            picture(page).save(FOLDER / f"{name}.png", optimize=True)
            page.close()
            print(name, flush=True)


if __name__ == "__main__":
    main()
