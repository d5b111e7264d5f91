"""One real ComfyUI server for all tests here, a client, two small trained adapters, and a check of the base model."""

import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # no ComfyUI is imported in this process

from device import ARGUMENTS, ON_CPU  # noqa: E402
from prompts import Playground, Prompt, latent_of  # noqa: E402

from runner.client import Client  # noqa: E402
from runner.server import Server  # noqa: E402

collect_ignore = ["test_training_gpu.py"] if ON_CPU else []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not ON_CPU:
        left_out = [item for item in items if item.get_closest_marker("on_cpu")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


class ServerWithHelpers(Server):
    def _stage(self) -> None:
        super()._stage()
        shutil.copy(Path(__file__).with_name("helper_nodes.py"), self.base / "custom_nodes")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    comfyui = Path(os.environ["COMFYUI_PATH"])
    with ServerWithHelpers(comfyui, sys.executable, ROOT, arguments=ARGUMENTS, log=log) as running:
        yield running


@pytest.fixture(scope="session", autouse=True)
def startup_log(server: Server) -> str:
    """What the server said until it answered, before any test could make it complain."""
    return server.log_text()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[Client]:
    with Client(server) as connected:
        yield connected


@pytest.fixture(scope="session")
def adapters(server: Server) -> Path:
    """The folder where SODA Save writes and SODA Loader looks."""
    folder = server.output / "loras" / "soda"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def train_file(client: Client, folder: Path, concept: str, role: str, **settings: object) -> str:
    """Trains for three steps and saves -> the new file's name."""
    before = set(folder.rglob("*.safetensors"))
    prompt = Prompt()
    playground = Playground(prompt)
    latents, positive = playground.drawings(concept)
    trained = playground.train(positive, latents=latents, role=role, **settings)
    playground.save((trained, 0), f"test_{role}")
    client.run(prompt)
    (new,) = set(folder.rglob("*.safetensors")) - before
    return new.name


@pytest.fixture(scope="session")
def subject(client: Client, adapters: Path) -> str:
    return train_file(client, adapters, "fip", "subject")


@pytest.fixture(scope="session")
def style(client: Client, adapters: Path) -> str:
    return train_file(client, adapters, "comic", "style", seed=6)


Base = tuple[torch.Tensor, str]


@pytest.fixture(scope="session")
def look_at_base(client: Client) -> Callable[[], Base]:
    """What the playground samples without any adapter, and a digest of all its weights; anew on every call."""

    def look() -> Base:
        prompt = Prompt()
        playground = Playground(prompt)
        node = playground.sample(playground.model, again=True)
        latent = prompt[node]["inputs"]["samples"]
        stored = prompt.add(
            "StoredBytes", model=playground.model, clip=playground.clip, latent=latent, salt=uuid.uuid4().hex
        )
        result = client.run(prompt)
        (digest,) = result.outputs[stored]["text"]
        return latent_of(client, result, node), digest

    return look


@pytest.fixture(scope="session")
def base(look_at_base) -> Base:
    return look_at_base()


@pytest.fixture(scope="session")
def base_latent(base: Base) -> torch.Tensor:
    return base[0]


@pytest.fixture
def base_unchanged(base: Base, look_at_base) -> Iterator[None]:
    """After the test the server still answers, and its base model has the weights it had and gives what it gave, bit
    for bit."""
    yield
    latent, digest = look_at_base()
    assert torch.equal(latent, base[0]) and digest == base[1]
