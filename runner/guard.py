"""Runs a Python module or script that cannot outlive the process that started it.

    python guard.py [--path FOLDER] -m MODULE arguments...
    python guard.py SCRIPT arguments...

The starter holds the other end of our stdin. When it closes, because the starter ended in whatever way (kill -9
included), this process and all that it started are killed. No standard library call does that on every system.
`--path` is put first on sys.path; without it nothing of this repository is importable in the child.
"""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import threading


def end_with_parent(pipe: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(pipe, 64):
            pass
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(os.getpid())], capture_output=True)
    else:
        os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    pipe = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=end_with_parent, args=(pipe,), daemon=True).start()

    arguments = sys.argv[1:]
    del sys.path[0]
    if arguments[0] == "--path":
        sys.path.insert(0, arguments[1])
        arguments = arguments[2:]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


main()
