"""The shipped workflows, converted as the page does and executed as they are, only with fewer steps."""

from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from runner.workflow import load_prompt, node_ids, set_values

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"
WORKFLOWS = sorted(path.stem for path in FOLDER.glob("*.json"))
FEW = {"SodaTrain": {"steps": 4, "batch_size": 2}, "KSampler": {"steps": 2}}


@pytest.fixture(scope="module")
def photos(server) -> Path:
    """Photographs of our own making with captions beside them, of sizes as phones give them."""
    folder = server.base / "input" / "my_photos"
    folder.mkdir()
    for number, size in enumerate([(900, 687), (1200, 1600), (2560, 1440)]):
        image = Image.radial_gradient("L").resize(size).convert("RGB")
        draw = ImageDraw.Draw(image)
        draw.ellipse((size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2), fill=(200, 40 * number, 60))
        image.save(folder / f"photo_{number}.jpg")
        (folder / f"photo_{number}.txt").write_text(f"a photo of sks dog, number {number}")
    return folder


def test_five_workflows_with_thumbnails_are_shipped():
    assert len(WORKFLOWS) >= 5
    assert all((FOLDER / f"{name}.jpg").is_file() for name in WORKFLOWS)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_runs(client, adapters, subject, style, photos, base_unchanged, name):
    prompt = load_prompt(FOLDER / f"{name}.json", client.get_json("/object_info"))
    for node in prompt.values():
        # The templates name the files of a reader; here the two that the tests trained stand in for them.
        names = [key for key in node["inputs"] if key.endswith("adapter_name")]
        node["inputs"].update(zip(names, (subject, style), strict=False))
    for class_type, values in FEW.items():
        if node_ids(prompt, class_type):
            set_values(prompt, class_type, **values)
    before = set(adapters.rglob("*.safetensors"))
    result = client.run(prompt)
    new = set(adapters.rglob("*.safetensors")) - before
    assert len(new) == len(node_ids(prompt, "SodaSave"))
    pictures = [image for node in node_ids(prompt, "PreviewImage") for image in result.images(node)]
    assert pictures
    assert all(client.view(image)[:4] == b"\x89PNG" for image in pictures)
