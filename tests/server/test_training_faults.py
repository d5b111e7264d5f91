"""SODA Train when disk, memory or numbers fail it: a sentence on the node, and a server that goes on."""

import contextlib
import re
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
from PIL import Image
from prompts import Playground, Prompt

from runner.client import PromptFailed


def training(**settings) -> tuple[Prompt, str]:
    prompt = Prompt()
    playground = Playground(prompt)
    latents, positive = playground.drawings()
    options = playground.options(**settings.pop("options", {}))
    more = {"targets": "cross-attention", "batch_size": 1, "clip": playground.clip, "vae": playground.vae}
    node = playground.train(positive, latents=latents, options=options, **{**more, **settings})
    prompt.add("PreviewAny", source=(node, 2))
    return prompt, node


@contextlib.contextmanager
def nothing_can_be_written_to(folder):
    """A file stands in the folder's place, which holds back the superuser as well."""
    aside = folder.with_name(f"{folder.name}.aside")
    folder.mkdir(parents=True, exist_ok=True)
    folder.rename(aside)
    folder.write_text("in its place")
    yield
    folder.unlink()
    aside.rename(folder)


@pytest.mark.parametrize("reuse", [True, False])
def test_without_room_for_checkpoints_the_training_goes_on(client, server, base_unchanged, reuse):
    prompt, node = training(seed=301, options={"checkpoint_every": 1}, reuse=reuse)
    with nothing_can_be_written_to(server.base / "user" / "soda" / "training"):
        said = client.run(prompt).texts[node][-1]
    assert "step 3/3" in said and "not kept on disk" in said and "check the folder" in said


def test_without_room_for_the_strip_the_training_is_kept(client, server, base_unchanged):
    prompt, node = training(seed=302, sample_prompt="a sks monster", steps=1)
    with nothing_can_be_written_to(server.output / "soda"):
        said = client.run(prompt).texts[node][-1]
    assert "step 1/1" in said and "The strip of samples could not be saved" in said


@pytest.mark.on_cpu
def test_cancelled_in_a_sample_the_samples_before_are_kept(client, server, base_unchanged):
    """The second sample begins once step 2 is told; on a GPU it would end before the word to cancel arrives."""
    prompt, node = training(seed=303, sample_prompt="a sks monster", steps=4, options={"sample_every": 1})
    before = set((server.output / "soda").glob("training_*.png"))

    def cancel(kind: str, data: dict) -> None:
        if kind == "progress" and data["node"] == node and data["value"] == 2:
            client.interrupt()

    with pytest.raises(PromptFailed, match="interrupted") as caught:
        client.run(prompt, cancel)
    (strip,) = set((server.output / "soda").glob("training_*.png")) - before
    assert f"The samples so far are saved as soda/{strip.name}" in caught.value.result.texts[node][-1]
    assert 192 < Image.open(strip).width < 2 * 192
    said = client.run(training(seed=303, steps=4, options={"sample_every": 1})[0]).texts[node]
    assert any("Went on from step 2" in text for text in said)


def test_samples_that_would_not_fit_are_left_out(client, base_unchanged):
    prompt, node = training(seed=307, sample_prompt="a sks monster", steps=4)
    prompt[node]["inputs"]["vae"] = [prompt.add("HugeVAE", vae=prompt[node]["inputs"]["vae"]), 0]
    said = client.run(prompt).texts[node]
    missing = re.findall(r"No sample after step (\d): it needs [\d.]+ GiB more memory", "\n".join(said))
    assert set(missing) == {"1", "2", "3", "4"} and "step 4/4" in said[-1]


@contextlib.contextmanager
def little_memory(server):
    """The server's process may take 150 MiB more than it has."""
    if not hasattr(psutil.Process, "rlimit"):
        pytest.skip("only Linux bounds another process")
    process = psutil.Process(server.process.pid)
    before = process.rlimit(psutil.RLIMIT_AS)
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + 150 * 2**20, before[1]))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_AS, before)


@pytest.mark.on_cpu
def test_out_of_memory_says_what_to_lower(client, server, base_unchanged):
    client.run(training(seed=304, steps=1)[0])
    prompt, node = training(seed=305, batch_size=400, options={"memory": "fast"})
    with (
        little_memory(server),
        pytest.raises(PromptFailed, match="not enough for batches of 400.*Lower batch_size") as at,
    ):
        client.run(prompt)
    assert "was not enough for the plan frugal" in at.value.result.texts[node][-1]
    client.run(training(seed=306, steps=1)[0])


def test_a_run_that_diverges_goes_back_thrice_and_keeps_its_last_good_adapter(client, server, base_unchanged):
    """One picture of many holds numbers whose squares are infinite; by this seed its turn comes at step 15."""
    pictures = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    pictures[7] *= 1e30
    latent = {"latent_tensor": pictures, "latent_format_version_0": torch.tensor([])}
    safetensors.torch.save_file(latent, server.base / "input" / "one_too_large.latent")
    prompt, node = training(seed=314, steps=200, learning_rate=0.001)
    prompt[node]["inputs"]["latents"] = [prompt.add("LoadLatent", latent="one_too_large.latent"), 0]
    prompt[node]["inputs"]["positive"] = list(Playground(prompt).text())
    with pytest.raises(PromptFailed, match="at step 15 .*after 3 times going back .*lower the learning rate") as caught:
        client.run(prompt)
    assert "went back to step 10" in caught.value.result.texts[node][-1]
    path = Path(str(caught.value).rsplit(" is kept in ", 1)[1].removesuffix("."))
    tensors = safetensors.torch.load_file(path)
    assert tensors and all(tensor.isfinite().all() for tensor in tensors.values())
    (told,) = [t for t in client.get_json("/soda/training")["trainings"] if t["node"] == node][-1:]
    assert told["state"] == "failed"


@pytest.mark.on_cpu
def test_a_run_that_fails_once_goes_back_and_ends(client, server, base_unchanged):
    """On a GPU steps are recorded, which calls no Python that could fail."""
    prompt, node = training(seed=315, steps=20, learning_rate=0.001)
    model = prompt.add("FailsOnce", model=tuple(prompt[node]["inputs"]["model"]), at=15)
    prompt[node]["inputs"]["model"] = [model, 0]
    said = client.run(prompt).texts[node]
    assert any("went back to step 10 and on at 0.5 of the rate" in text for text in said)
    assert "step 20/20" in said[-1]
    (told,) = [t for t in client.get_json("/soda/training")["trainings"] if t["node"] == node][-1:]
    assert told["state"] == "finished" and [step for step, *_ in told["points"]] == list(range(1, 21))
