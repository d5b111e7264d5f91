"""Writers that are killed, in forked children; run with the repository and a folder, prints what the killed left.

lines: killed before line 1, 2, ... of what a save runs through in Python, until one comes to its end.
random: 40 writers in a loop, killed after a random time.
"""

import os
import pathlib
import random
import signal
import sys
import tempfile
import time

sys.path.insert(0, sys.argv[1])
import torch  # noqa: E402

from soda import atomic  # noqa: E402
from soda.adapter import Adapter, Layer  # noqa: E402
from soda.file import load, save  # noqa: E402

SYSTEM_CALLS = ("mkdir", "write_bytes", "open", "chmod")  # of pathlib; its other lines only take names apart


def watched(code) -> bool:
    if code.co_filename == pathlib.__file__:
        return code.co_name in SYSTEM_CALLS
    return code.co_filename in (atomic.__file__, tempfile.__file__)


def adapter(value: float) -> Adapter:
    logs = (torch.zeros(3), torch.full((44850,), 0.1))
    return Adapter({f"layer{i}": (Layer("lq", torch.full((900,), value), logs),) for i in range(4)}, {})


def in_child(work) -> int:
    """The pid of a child that does the work and leaves without cleaning up."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid


def found(path: pathlib.Path) -> str:
    """`old`, `new`, or whatever else is there."""
    try:
        values = {value for (term,) in load(path).layers.values() for value in term.delta.tolist()}
    except Exception as error:
        return str(error)
    return {(1.0,): "old", (2.0,): "new"}.get(tuple(values), str(values))


def killed_at(line: int, path: pathlib.Path) -> bool:
    """Whether a writer of the new file was killed before it came to its end."""

    def work() -> None:
        passed = 0

        def count(frame, event, _):
            nonlocal passed
            passed += 1
            if passed > line:
                os.kill(os.getpid(), signal.SIGKILL)
            return count

        sys.settrace(lambda frame, event, _: count if watched(frame.f_code) else None)
        save(new, path)

    return os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) == -signal.SIGKILL


def write_for_ever(path: pathlib.Path) -> None:
    while True:
        save(new, path)
        save(old, path)


torch.set_num_threads(1)
old, new = adapter(1.0), adapter(2.0)
path = pathlib.Path(sys.argv[2]) / "f.safetensors"
save(old, path)
line = 0
while killed_at(line, path):
    parts = list(path.parent.glob(f"*{atomic.PART}"))
    print("lines", found(path), "and", len(parts), "part" if len(parts) == 1 else "parts")
    for part in parts:  # or the next writer would run through more lines, and so on without end
        part.unlink()
    save(old, path)
    line += 1
print("end", found(path))
chance = random.Random(0)
for _ in range(40):
    pid = in_child(lambda: write_for_ever(path))
    time.sleep(chance.random() * 0.03)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print("random", found(path))
