"""Finds a Chromium or Chrome for the browser tests, and gets one where there is none."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from . import cache, process
from .errors import RunError
from .terminal import Status

NAMES = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "chrome", "msedge")
WINDOWS = tuple(
    f"{folder}/Application/{name}.exe"
    for folder, name in (("Google/Chrome", "chrome"), ("Chromium", "chrome"), ("Microsoft/Edge", "msedge"))
)
REMEDY = "install Chromium or Chrome, name one with SODA_BROWSER, or leave these tests out with --no-browser"


def find_browser(python: Path, variables: dict[str, str], status: Status) -> tuple[str, str]:
    """-> (path of a browser that starts, how it came there); RunError with the remedy if none can be had."""
    if named := os.environ.get("SODA_BROWSER"):
        if not _works(named):
            raise RunError(f"SODA_BROWSER={named} does not start; correct or unset it.")
        return named, "named by SODA_BROWSER"
    for path in _installed():
        if _works(path):
            return path, "already installed"
    if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        status.update("Installing Chromium with apt-get")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-q"], ["install", "-y", "-q", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", *command], env=environment, capture_output=True, stdin=subprocess.DEVNULL)
        if (path := shutil.which("chromium")) and _works(path):
            return path, "installed now with apt-get"
    return _download(python, variables, status), "downloaded now by Playwright"


def _installed() -> Iterator[str]:
    yield from filter(None, map(shutil.which, NAMES))
    if sys.platform == "darwin":
        for name in ("Google Chrome", "Chromium", "Microsoft Edge"):
            yield f"/Applications/{name}.app/Contents/MacOS/{name}"
    for variable in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA"):
        if os.environ.get(variable):
            yield from (str(Path(os.environ[variable]) / name) for name in WINDOWS)
    yield from map(str, _downloaded())


def _downloaded() -> list[Path]:
    folder = cache.cache_folder() / "browsers"
    names = ("chrome", "chrome.exe", "Chromium", "Google Chrome for Testing")
    return [path for name in names for path in folder.glob(f"chromium-*/**/{name}") if path.is_file()]


def _works(path: str) -> bool:
    """Ubuntu's chromium-browser, for one, is a stub that only asks for a snap."""
    if not Path(path).is_file():
        return False
    if os.name == "nt":
        return True  # chrome.exe --version opens a window there
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, timeout=30, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and any(character.isdigit() for character in answer.stdout.decode(errors="replace"))


def _download(python: Path, variables: dict[str, str], status: Status) -> str:
    folder = cache.cache_folder()
    status.update("Downloading Chromium with Playwright")
    as_root = sys.platform == "linux" and os.geteuid() == 0
    arguments = ["-m", "playwright", "install", *(["--with-deps"] if as_root else []), "chromium", "--no-shell"]
    log = folder / "browsers.log"
    with cache.lock(folder, status), open(log, "wb") as output:
        environment = {**variables, "PLAYWRIGHT_BROWSERS_PATH": str(folder / "browsers")}
        process.run(python, arguments, environment=environment, output=output)
    for path in _downloaded():
        if _works(str(path)):
            return str(path)
    raise RunError(f"No browser was found and none could be downloaded ({log}); {REMEDY}.")
