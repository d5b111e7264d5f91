"""run.py when things go wrong: one sentence, a non-zero exit code, and no process left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]


def environment(**changes: str | None) -> dict[str, str]:
    """Ours, with the ComfyUI that the tests use named explicitly; None removes a variable."""
    variables = {**os.environ, "COMFYUI_PYTHON": sys.executable, **changes}
    variables.pop("PYTHONPATH", None)
    return {name: value for name, value in variables.items() if value is not None}


def run(cwd: Path, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    variables = environment(TMPDIR=str(cwd), **changes)
    return subprocess.run(command, cwd=cwd, env=variables, text=True, capture_output=True, timeout=240)


def sentence(done: subprocess.CompletedProcess) -> str:
    """The one line on stderr; a traceback would be more."""
    assert done.returncode not in (0, None)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("run.py: ")
    return lines[0]


def test_a_comfyui_path_without_a_comfyui(tmp_path):
    assert str(tmp_path) in sentence(run(tmp_path, "demo", COMFYUI_PATH=str(tmp_path)))


def test_a_python_that_cannot_run_comfyui(tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    python = bare / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    assert "COMFYUI_PYTHON" in sentence(run(tmp_path, "demo", COMFYUI_PYTHON=str(python)))


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"Port {port} is taken" in sentence(run(tmp_path, "demo", "--port", str(port)))


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    done = run(tmp_path, "demo", COMFYUI_PATH=None, COMFYUI_PYTHON=None, SODA_CACHE=str(tmp_path / "file" / "cache"))
    assert "SODA_CACHE" in sentence(done)


def test_no_network(tmp_path):
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0",
               "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": "", "PIP_NO_CACHE_DIR": "1"}  # fmt: skip
    done = run(tmp_path, "demo", COMFYUI_PATH=None, COMFYUI_PYTHON=None, SODA_CACHE=str(tmp_path / "cache"), **nowhere)
    assert "check the network" in sentence(done)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def descendants(pid: int) -> list[psutil.Process]:
    """All processes below `pid`, children of other process groups included."""
    return psutil.Process(pid).children(recursive=True)


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def server_below(pid: int) -> psutil.Process | None:
    for child in descendants(pid):
        with contextlib.suppress(psutil.Error):
            if {"--base-directory", "--database-url"} <= set(child.cmdline()):
                return child
    return None


@pytest.fixture
def demo(tmp_path):
    """A running demo whose server process has started."""
    command = [sys.executable, str(ROOT / "run.py"), "demo"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = subprocess.Popen(command, cwd=tmp_path, env=environment(TMPDIR=str(tmp_path)), text=True, **pipes)
    assert wait_until(lambda: server_below(started.pid), 90)
    yield started
    started.kill()
    started.communicate()


SIGNALS = ["SIGKILL"] if os.name == "nt" else ["SIGINT", "SIGTERM", "SIGKILL"]


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("delay", [0.0, 6.0])
def test_nothing_is_left_behind_by_a_signal(demo, name, delay):
    time.sleep(delay)
    running = descendants(demo.pid)
    assert len(running) >= 2
    demo.kill() if name == "SIGKILL" else demo.send_signal(getattr(signal, name))
    _, errors = demo.communicate(timeout=40)
    assert demo.returncode != 0
    assert wait_until(lambda: all(map(is_gone, running)), 10), [p for p in running if not is_gone(p)]
    if name != "SIGKILL":
        assert errors.strip().splitlines() == ["run.py: stopped; nothing is left running."]


def test_nothing_is_left_behind_when_the_server_dies(demo):
    running = descendants(demo.pid)
    server_below(demo.pid).kill()
    _, errors = demo.communicate(timeout=40)
    assert demo.returncode == 1
    assert "run.py: The ComfyUI server died (exit code " in errors
    assert len(errors.strip().splitlines()) == 1
    assert wait_until(lambda: all(map(is_gone, running)), 10)
