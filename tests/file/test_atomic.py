"""A writer leaves the old file or the new one, whatever happens to it."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from soda.adapter import Adapter, Layer
from soda.atomic import PART, STALE_SECONDS, replace_file
from soda.errors import SodaFileError
from soda.file import load, save
from soda.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked writers")
def test_a_writer_killed_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path):
    """Before every line of Python that a save runs through, and at 40 random moments."""
    command = [sys.executable, str(Path(__file__).with_name("killed_writer.py")), str(ROOT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left = Counter(done.stdout.splitlines())
    lines = {f"lines {file} and {parts}" for file in ("old", "new") for parts in ("0 parts", "1 part")}
    assert set(left) <= lines | {"end new", "random old", "random new"}, left
    assert sum(left[line] for line in lines) > 30 and left["lines old and 1 part"] > 5 and left["end new"] == 1
    assert left["random old"] + left["random new"] == 40
    parts = list(tmp_path.glob(f"*{PART}"))
    assert len(parts) + 1 == len(os.listdir(tmp_path)) and 0 < len(parts) <= 40
    for part in parts:
        os.utime(part, (0, time.time() - STALE_SECONDS - 1))
    save(load(tmp_path / "f.safetensors"), tmp_path / "other.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["f.safetensors", "other.safetensors"]


def test_what_another_writer_is_at_is_left_alone(tmp_path):
    (tmp_path / f".f.x{PART}").write_bytes(b"half")
    (tmp_path / ".hidden").write_bytes(b"old")
    os.utime(tmp_path / ".hidden", (0, 0))
    replace_file(tmp_path / "f", lambda file: file.write_bytes(b"new"))
    assert sorted(os.listdir(tmp_path)) == [f".f.x{PART}", ".hidden", "f"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError("disk full")])
def test_an_error_while_writing_leaves_the_old_file(tmp_path, error):
    (tmp_path / "f").write_bytes(b"old")

    def write(file):
        file.write_bytes(b"half")
        raise error

    expected = SodaFileError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        replace_file(tmp_path / "f", write)
    assert (tmp_path / "f").read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_an_error_of_the_disk_leaves_the_old_file(tmp_path, monkeypatch, name):
    (tmp_path / "f").write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(SodaFileError, match="f: the file cannot be written .*No space left.*;"):
        replace_file(tmp_path / "f", lambda file: file.write_bytes(b"new"))
    assert (tmp_path / "f").read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    replace_file(tmp_path / "f", lambda file: (file.write_bytes(b"new"), calls.append("write")))
    assert calls == ["write", "sync", "replace"]


def test_long_names_and_new_folders(tmp_path):
    path = tmp_path / "a" / "b" / ("x" * 240 + ".safetensors")
    replace_file(path, lambda file: file.write_bytes(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == [path.name]


def test_two_writers_and_a_reader(tmp_path):
    """The reader finds one of the two adapters, whole, every time."""
    path = tmp_path / "f.safetensors"
    adapters = [Adapter({"x": (Layer("lq", torch.full((4,), v), (torch.zeros(6),)),)}, {}) for v in (1.0, 2.0)]
    save(adapters[0], path)
    writers = [threading.Thread(target=lambda a=a: [save(a, path) for _ in range(40)]) for a in adapters]
    for writer in writers:
        writer.start()
    hashes = {load(path).content_hash for _ in range(100)}
    for writer in writers:
        writer.join()
    assert hashes <= {adapter.content_hash for adapter in adapters} and os.listdir(tmp_path) == [path.name]


ADAPTERS = [Adapter({"a": (Layer("none", None, (torch.zeros(n),)),)}) for n in (1, 4950)]
STATES = [{"losses": torch.zeros(n)} for n in (1, 4950)]


@pytest.mark.parametrize(
    "write", [lambda path, i: save(ADAPTERS[i], path), lambda path, i: checkpoint.write(path, STATES[i])]
)
def test_a_full_disk_is_named_whatever_writes(tmp_path, write):
    """safetensors has an error of its own for it. Here no file may grow beyond 4 KB."""
    resource, path = pytest.importorskip("resource"), tmp_path / "f"
    write(path, 0)
    old, before = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(SodaFileError, match="cannot be written .*; check the free space"):
            write(path, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["f"]
