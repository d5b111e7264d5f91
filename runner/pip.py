"""pip, quietly: one status line while it works, one sentence when it fails, its whole output in a log file."""

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import process
from .errors import RunError
from .terminal import Status, duration

NETWORK_SIGNS = (
    "NewConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "Temporary failure in name resolution",
    "Failed to establish a new connection", "Network is unreachable", "Connection refused", "ProxyError",
    "Could not fetch URL", "getaddrinfo failed", "Connection broken", "SSLError", "Max retries exceeded",
)  # fmt: skip
DISK_SIGNS = ("No space left on device", "Errno 28", "not enough space on the disk")


def pip(python: str | Path, arguments: Sequence[str], what: str, log: Path, status: Status) -> None:
    """`python -m pip ARGUMENTS`; `what` is what the reader waits for, as in "Installing PyTorch"."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    started = time.monotonic()
    with open(log, "wb") as output:
        child = process.start(
            python,
            ["-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "2", "--no-color", *arguments],
            output=output,
            environment=environment,
            cwd=log.parent,
        )
        try:
            while child.poll() is None:
                status.update(f"{what}: {_doing(log)} ({duration(time.monotonic() - started)})")
                time.sleep(0.25)
        finally:
            process.stop(child)
    if child.returncode != 0:
        status.clear()
        raise RunError(explain(what, log))


def explain(what: str, log: Path) -> str:
    """Why pip failed, from its log, in one sentence with the remedy."""
    text = log.read_text(errors="replace")
    if any(sign in text for sign in DISK_SIGNS):
        return f"{what} failed: the disk is full; free some space or set SODA_CACHE to another disk ({log})."
    if any(sign in text for sign in NETWORK_SIGNS):
        return (
            f"{what} failed: the package index cannot be reached; check the network (or the proxy and index in "
            f"pip's settings) and run the command again ({log})."
        )
    if "No matching distribution" in text or "requires a different Python" in text:
        version = ".".join(map(str, sys.version_info[:2]))
        missing = re.findall(r"No matching distribution found for (\S+)", text)
        return (
            f"{what} failed: the package index has no {missing[-1] if missing else 'such package'} for Python "
            f"{version} on this machine; try Python 3.11 to 3.13 ({log})."
        )
    if "No module named pip" in text:
        return f"{what} failed: this Python has no pip; install it (python -m ensurepip, or your system's python3-pip)."
    errors = re.findall(r"^ERROR: (.+)$", text, re.MULTILINE)
    return f"{what} failed: {errors[-1] if errors else 'pip ended with an error'} ({log})."


def _doing(log: Path) -> str:
    """The last thing that pip says it is at, shortened to a verb and a package."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        found = re.match(r"\s*(Collecting|Downloading|Using cached|Building|Installing|Processing)\s+(.*)", line)
        if found:
            verb, rest = found.groups()
            if verb == "Installing" and "collected packages" in rest:
                return "unpacking"
            name = rest.split("/")[-1].split()[0] if rest.split() else ""
            size = re.search(r"\(([\d.]+ [kMG]B)\)", rest)
            return f"{verb.lower()} {re.split(r'[-=<>;(]', name)[0]}{' ' + size.group(0) if size else ''}"
    return "starting"
