"""run.py demo: the shipped workflows, queued in a real ComfyUI one by one, and a contact sheet of their images.

Train a subject, train a style (each saved and read back), load each alone, mix both. Runs in ComfyUI's Python.
"""

import argparse
import os
import subprocess
import sys
import time
import webbrowser
from pathlib import Path

from playground.concepts import HELD_OUT_STYLES, STYLE_WORD, SUBJECT_WORD, SUBJECTS

from . import figures
from .client import Client, PromptFailed, Refused, Result
from .environment import REPOSITORY
from .errors import RunError, Stopped
from .main import end_on_signals
from .server import PACK, Server
from .sheet import Row, write_sheet
from .terminal import Status, duration
from .workflow import load_prompt, node_ids, set_values

WORKFLOWS = REPOSITORY / "example_workflows"
LOAD, MIX, TRAIN = "soda_1_load_one_adapter", "soda_2_mix_two_adapters", "soda_3_train_and_use"
SUBJECT, STYLE = next(iter(SUBJECTS)), HELD_OUT_STYLES[0]
SUBJECT_PROMPT = f"a {SUBJECT_WORD} monster on a gray background"
STYLE_PROMPT = f"a yellow square monster with horns on a gray background, {STYLE_WORD} style"
MIX_PROMPT = f"a {SUBJECT_WORD} monster on a gray background, {STYLE_WORD} style"
SEED, COLUMNS = 7, 4
# A subject is what the words mean, a style how places of the picture act on each other: weights that they do not share.
SETTINGS = {
    "subject": {"targets": "cross-attention", "learning_rate": 0.015, "steps": 200},
    "style": {"targets": "self-attention", "learning_rate": 0.04, "steps": 300},
}


class Demo:
    """The steps of the demo on one connection; each prints a line when it is done."""

    def __init__(self, client: Client, status: Status) -> None:
        self.client, self.status = client, status
        self.object_info = client.get_json("/object_info")

    def train(self, role: str, concept: str, prompt_text: str, trigger: str) -> str:
        """Trains on the built-in drawings of a concept and saves -> the file's name as SODA Loader lists it."""
        prompt = load_prompt(WORKFLOWS / f"{TRAIN}.json", self.object_info)
        set_values(prompt, "SodaPlaygroundDrawings", concept=concept)
        set_values(prompt, "SodaTrain", role=role, **SETTINGS[role])
        set_values(prompt, "SodaSave", filename_prefix=f"my_{role}", trigger_words=trigger)
        self._set_sampling(prompt, prompt_text, images=1)
        before = self._files()
        self._run(f"Training the {role}", prompt)
        new = [name for name in self._files() if name not in before]
        if len(new) != 1:
            raise RunError(f"Training the {role} should list one new adapter in SODA Loader, not {new or 'none'}.")
        return new[0]

    def load(self, name: str, prompt_text: str) -> list[bytes]:
        prompt = load_prompt(WORKFLOWS / f"{LOAD}.json", self.object_info)
        set_values(prompt, "SodaLoader", adapter_name=name)
        self._set_sampling(prompt, prompt_text)
        return self._pictures(prompt, self._run(f"Sampling with {name}", prompt))[-1]

    def mix(self, subject: str, style: str, prompt_text: str) -> tuple[list[bytes], list[bytes]]:
        """-> pictures without any adapter, and with both mixed; same prompt, same seeds."""
        prompt = load_prompt(WORKFLOWS / f"{MIX}.json", self.object_info)
        inputs = prompt[node_ids(prompt, "SodaMix")[0]]["inputs"]
        rows = [name for name in inputs if name.endswith(".adapter_name")]
        inputs.update(zip(rows, (subject, style), strict=True))
        self._set_sampling(prompt, prompt_text)
        base, mixed = self._pictures(prompt, self._run("Sampling the base and the mix", prompt))
        return base, mixed

    def _set_sampling(self, prompt: dict, text: str, images: int = COLUMNS) -> None:
        """The positive prompt is the one that is not empty."""
        for node in node_ids(prompt, "CLIPTextEncode"):
            if prompt[node]["inputs"]["text"]:
                prompt[node]["inputs"]["text"] = text
        set_values(prompt, "KSampler", seed=SEED)
        set_values(prompt, "EmptyLatentImage", batch_size=images)
        set_values(prompt, "ImageScaleBy", scale_by=1.0)  # the pixels of the model itself

    def _files(self) -> list[str]:
        definition = self.client.get_json("/object_info/SodaLoader")["SodaLoader"]["input"]["required"]["adapter_name"]
        return definition[1]["options"] if definition[0] == "COMBO" else definition[0]

    def _pictures(self, prompt: dict, result: Result) -> list[list[bytes]]:
        """One list of pictures per preview of a sampler, in the workflow's order."""
        enlarged = node_ids(prompt, "ImageScaleBy")
        previews = [n for n in node_ids(prompt, "PreviewImage") if prompt[n]["inputs"]["images"][0] in enlarged]
        return [[self.client.view(image) for image in result.images(node)] for node in previews]

    def _run(self, what: str, prompt: dict) -> Result:
        started = time.monotonic()
        last_loss = ""

        def show(kind: str, data: dict) -> None:
            nonlocal last_loss
            if kind == "text" and prompt.get(data["node"], {}).get("class_type") == "SodaTrain":
                line = data["text"].splitlines()[0]
                self.status.update(f"{what}: {line}")
                last_loss = next((f", {part}" for part in line.split(", ") if part.startswith("loss")), last_loss)
            elif kind == "progress" and prompt.get(data["node"], {}).get("class_type") == "KSampler":
                self.status.update(f"{what}: sampling, step {data['value']}/{data['max']}")

        self.status.update(f"{what} ...")
        try:
            result = self.client.run(prompt, show, timeout=3600)
        except PromptFailed as failure:
            error = failure.result.error
            raise RunError(f"{what} failed in {error['type']}: {error['message']}") from failure
        except Refused as refused:
            raise RunError(f"{what} failed, ComfyUI refused the workflow: {refused.reasons()}") from refused
        self.status.done(f"{what}: done in {duration(time.monotonic() - started)}{last_loss}")
        return result


def run(options: argparse.Namespace, status: Status) -> None:
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    status.update("Starting ComfyUI ...")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that wait awake for a moment: a sixth less time a step
    log = output / "comfyui.log"
    arguments = server_arguments()
    with Server(options.comfyui, sys.executable, REPOSITORY, output=output, port=options.port, arguments=arguments,
                log=log) as server, Client(server) as client:  # fmt: skip
        status.done(f"ComfyUI answers on {server.url} after {duration(time.monotonic() - started)}")
        demo = Demo(client, status)
        subject = demo.train("subject", SUBJECT, SUBJECT_PROMPT, f"{SUBJECT_WORD} monster")
        style = demo.train("style", STYLE, STYLE_PROMPT, f"{STYLE_WORD} style")
        with_subject = demo.load(subject, SUBJECT_PROMPT)
        with_style = demo.load(style, STYLE_PROMPT)
        base, mixed = demo.mix(subject, style, MIX_PROMPT)
        sheet = output / "contact_sheet.png"
        rows = [
            Row("base", MIX_PROMPT, base),
            Row("subject adapter", SUBJECT_PROMPT, with_subject),
            Row("style adapter", STYLE_PROMPT, with_style),
            Row("mix of both", MIX_PROMPT, mixed),
        ]
        write_sheet(rows, [f"seed {SEED}, image {column + 1}" for column in range(COLUMNS)], sheet)
        status.done(f"\nDone in {duration(time.monotonic() - started)}.")
        status.done(f"Contact sheet: {sheet}")
        status.done(f"Adapters:      {output / 'loras' / 'soda'} ({subject}, {style})")
        status.done(f"Server log:    {log}")
        status.done(f"\n{figures.table(rows, SUBJECT, STYLE)}")
        if options.keep:
            keep(server, client, status)


def keep(server: Server, client: Client, status: Status) -> None:
    """Opens the page on the training workflow and stays until Ctrl-C or the server's end."""
    client.post("/settings/Comfy.TutorialCompleted", True)  # else its template browser covers the workflow
    page = f"{server.url}/?template={TRAIN}&source={PACK}"
    status.done(f"\nComfyUI stays up: {page}\nPress Ctrl-C to stop it.")
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(page)  # without a display it might start a text browser in this terminal
    while True:
        server.require_alive()
        time.sleep(1)


def server_arguments() -> list[str]:
    """The CPU where PyTorch has no GPU; asked in another process, which gives its memory back."""
    script = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 3)"
    if subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0:
        return []
    return ["--cpu", "--use-pytorch-cross-attention", "--force-channels-last"]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--keep", action="store_true")
    end_on_signals()
    status = Status()
    try:
        run(parser.parse_args(), status)
    except RunError as error:
        status.clear()
        print(f"\nrun.py: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Stopped):
        status.clear()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
