"""Children that are stopped with everything they started, and that end when we do, however we end (see guard.py)."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

TimeoutExpired = subprocess.TimeoutExpired
GUARD = Path(__file__).with_name("guard.py")


def start(
    python: str | Path,
    arguments: Sequence[str],
    *,
    output: IO | None = None,
    environment: dict[str, str] | None = None,
    cwd: str | Path | None = None,
) -> subprocess.Popen:
    """Starts `python ARGUMENTS` (script or `-m module`) in its own process group; `output` takes stdout and stderr."""
    group = {"start_new_session": True}
    if os.name == "nt":
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return subprocess.Popen(
        [str(python), str(GUARD), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        env=environment,
        cwd=cwd,
        **group,
    )


def stop(process: subprocess.Popen, polite_seconds: float = 0.0) -> None:
    """Ends the process and its children: asks with Ctrl-C, waits `polite_seconds`, then kills the whole group."""
    if process.poll() is None and polite_seconds > 0:
        with contextlib.suppress(OSError, ValueError):
            if os.name == "nt":
                process.send_signal(signal.CTRL_BREAK_EVENT)
            else:
                process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(polite_seconds)
    if os.name != "nt":
        # The leader may be dead and its children not: the group is addressed either way.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    process.wait()


def run(
    python: str | Path,
    arguments: Sequence[str],
    *,
    polite_seconds: float = 15.0,
    timeout: float | None = None,
    **options,
) -> int:
    """Runs to the end -> exit code; on any exception, Ctrl-C and TimeoutExpired included, nothing stays behind."""
    process = start(python, arguments, **options)
    try:
        return process.wait(timeout)
    finally:
        stop(process, polite_seconds)
