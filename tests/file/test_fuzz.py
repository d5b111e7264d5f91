"""20,000 broken files: each is refused with a SodaFileError that names it, or is a whole adapter after all."""

import json
import random
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from damage import ALWAYS_BAD, SOMETIMES_BAD, good, pack

from soda.errors import SodaFileError
from soda.file import load, validate

ROOT = Path(__file__).resolve().parents[2]
DAMAGES = [*ALWAYS_BAD, *SOMETIMES_BAD]
ROUNDS = 20_000 // len(DAMAGES)  # different files per kind of damage


def test_there_are_20_000():
    assert ROUNDS * len(DAMAGES) >= 20_000


def check_whole(adapter, data):
    """Every number of the file is in the adapter, and the adapter keeps the promises of its types."""
    length = struct.unpack("<Q", data[:8])[0]
    names = json.loads(data[8 : 8 + length]).keys() - {"__metadata__"}
    found = 0
    for layer, terms in adapter.layers.items():
        assert isinstance(layer, str) and layer and len(terms) == 1
        (term,) = terms
        assert 1 <= len(term.logs) <= 5 and term.dimension >= 1
        assert (term.delta is None) == (term.decomposition == "none")
        assert term.delta is None or 1 <= term.delta.numel() <= term.dimension
        tensors = [t for t in (term.delta, *term.logs, term.sketch) if t is not None]
        assert all(t.dtype == torch.float32 and t.device.type == "cpu" and t.isfinite().all() for t in tensors)
        found += len(tensors)
    assert found == len(names)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_broken_file_is_refused_or_whole(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    path = Path("bad file.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tried: set[int] = set()
    refused = seed = 0
    while len(tried) < ROUNDS:
        seed += 1
        original = good(seed)
        sound = pack(*original)
        data = damage(*original, random.Random(seed))
        if data == sound or hash(data) in tried:
            continue
        tried.add(hash(data))
        path.write_bytes(data)
        try:
            adapter = load(path)
        except SodaFileError as error:
            message = str(error)
            assert message.startswith(str(path)) and 20 < len(message) - len(str(path)) < 800, message
            assert message.isprintable(), ascii(message)
            if seed % 16 == 0:
                assert not validate(path)[0]
            refused += 1
        else:
            assert damage in SOMETIMES_BAD, data[:2000]
            check_whole(adapter, data)
    assert refused > 0 and (refused == ROUNDS or damage in SOMETIMES_BAD)
    assert not Path("exploded").exists()  # nothing was unpickled
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; claims of a header cost nothing


def test_the_undamaged_file_loads(tmp_path):
    (tmp_path / "good.safetensors").write_bytes(pack(*good()))
    adapter = load(tmp_path / "good.safetensors")
    check_whole(adapter, pack(*good()))
    assert {name: terms[0].sizes for name, terms in adapter.layers.items()} == {
        "a.to_q": (3, 4), "a.to_k[8:16]": (2, 4, 5), "b.to_out.0": (6,)
    }  # fmt: skip


LIMITED = """
import resource, sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from soda.file import validate
data = 1024 * int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmData")))
resource.setrlimit(resource.RLIMIT_DATA, (data + (64 << 20),) * 2)
try:
    bytearray(128 << 20)
except MemoryError:
    for path in sorted(Path(sys.argv[2]).iterdir()):
        print(path.name, validate(path))
"""


def huge_files(folder):
    """Files that really are of 3 GiB (holes on the disk), or that claim to be of 2 GiB or more."""
    whole = 3 << 30

    def tensor(shape, dtype="F32", size=whole):
        return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}

    headers = {
        "a checkpoint": {"model.diffusion_model.x.weight": tensor([3 << 18, 1 << 10])},
        "a spectrum": {"x.soda_lq": tensor([3 << 28])},
        "a factor": {"x.soda_log_R0": tensor([3 << 28])},
        "a sketch": {"x.soda_sketch": tensor([3 << 28])},
        "bytes": {"x.soda_lq": tensor([whole], "U8")},
    }
    for name, header in headers.items():
        with (folder / f"{name} of 3 GiB").open("wb") as file:
            file.write(pack(header, b""))
            file.truncate(file.tell() + whole)
        (folder / f"{name} claimed").write_bytes(pack(header, bytes(64)))
    for length in (8 << 20, (8 << 20) + 1, 2 << 30, 1 << 62, (1 << 64) - 1):
        with (folder / f"a header of {length}").open("wb") as file:
            file.write(struct.pack("<Q", length) + b"{")
            file.truncate(min(whole, length))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_DATA and files with holes")
def test_huge_files_are_refused_within_64_mib(tmp_path):
    """In a process that may not allocate more than that."""
    files = tmp_path / "files"
    files.mkdir()
    huge_files(files)
    command = [sys.executable, "-c", LIMITED, str(ROOT), str(files)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(list(files.iterdir())) == 15, done.stderr
    for line in lines:
        assert "(False," in line and "memory" not in line and ";" in line or "Download" in line, line
