"""One real ComfyUI server for all tests here, a client, two small trained adapters, and a check of the base model."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # no ComfyUI is imported in this process

from prompts import Playground, Prompt, latent_of  # noqa: E402

from runner.client import Client  # noqa: E402
from runner.server import Server  # noqa: E402


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    arguments = ("--cpu", "--use-pytorch-cross-attention")
    with Server(Path(os.environ["COMFYUI_PATH"]), sys.executable, ROOT, arguments=arguments, log=log) as running:
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


@pytest.fixture(scope="session")
def sample_base(client: Client) -> Callable[[], torch.Tensor]:
    """Samples the playground without any adapter, anew on every call."""

    def sample() -> torch.Tensor:
        prompt = Prompt()
        playground = Playground(prompt)
        node = playground.sample(playground.model, again=True)
        return latent_of(client, client.run(prompt), node)

    return sample


@pytest.fixture(scope="session")
def base_latent(sample_base) -> torch.Tensor:
    return sample_base()


@pytest.fixture
def base_unchanged(base_latent: torch.Tensor, sample_base) -> Iterator[None]:
    """After the test the server still answers, and its base model gives what it gave before, bit for bit."""
    yield
    assert torch.equal(sample_base(), base_latent)
