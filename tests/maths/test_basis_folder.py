"""The folder of bases: damaged files, its bound, two processes, folders that cannot be used, writing behind the job."""

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from some_bases import filled, near, same, size_on_disk, some_weights

from soda import basis_folder
from soda.basis_cache import BasisCache
from soda.basis_folder import SUFFIX, BasisFolder
from soda.decomposition import decompose

DAMAGES = ["truncated", "empty", "longer", "noise", "flipped", "half zeros", "zeros", "of another weight", "a folder"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_replaced(tmp_path, computed, damage):
    weights = some_weights(1, (16, 24))
    filled(BasisCache(folder=tmp_path), weights)
    (file,) = tmp_path.glob(f"*{SUFFIX}")
    good = file.read_bytes()
    if damage == "a folder":
        file.unlink()
        file.mkdir()
    elif damage == "of another weight":
        other = tmp_path / "other"
        filled(BasisCache(folder=other), some_weights(1, (16, 24), seed=1))
        os.replace(next(other.glob(f"*{SUFFIX}")), file)
    else:
        middle = len(good) // 2
        file.write_bytes({
            "truncated": good[:middle],
            "empty": b"",
            "longer": good + b"x",
            "noise": (bytes(range(256)) * len(good))[: len(good)],
            "flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "half zeros": good[:middle] + bytes(len(good) - middle),
            "zeros": bytes(len(good)),
        }[damage])  # fmt: skip
    found = filled(BasisCache(folder=tmp_path), weights)
    assert len(computed) == (2 if damage != "of another weight" else 3)
    assert same(found["layer0"], decompose(weights["layer0"], "lq").kept())
    if damage != "a folder":
        assert file.read_bytes() == good


@pytest.mark.parametrize("advised", [True, False])
def test_many_come_in_the_order_in_which_they_are_wanted(tmp_path, monkeypatch, advised):
    """Whether or not the system can be told what comes, as it cannot on Windows."""
    if not advised:
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    monkeypatch.setattr(basis_folder, "AHEAD", 3)
    monkeypatch.setattr(basis_folder, "SLOW", 1 << 60)
    bases = {name: decompose(w, "lq").kept() for name, w in some_weights(10).items()}
    folder = BasisFolder(tmp_path, 1 << 20)
    for name, basis in bases.items():
        folder.put((name, "lq"), basis)
    (tmp_path / f"layer7.lq{SUFFIX}").unlink()
    for count in (0, 2, 10):
        wanted = [((name, "lq"), (6, 9)) for name in list(bases)[:count]]
        found = list(folder.each(wanted))
        assert [basis is not None for basis in found] == [name != "layer7" for (name, _), _ in wanted]
        assert all(same(basis, bases[key[0]]) for (key, _), basis in zip(wanted, found, strict=True) if basis)


def test_a_file_that_another_process_uses_may_stay(tmp_path, monkeypatch, caplog):
    """As on Windows, where it cannot be replaced then."""
    filled(BasisCache(folder=tmp_path), some_weights(1))
    (file,) = tmp_path.glob(f"*{SUFFIX}")
    key, good, folder = (file.name.split(".")[0], "lq"), file.read_bytes(), BasisFolder(tmp_path, 1 << 20)
    basis, replaced = folder.get(key, (6, 9)), os.replace

    def in_use(one, other):
        if other == file:
            raise PermissionError(13, "in use")
        replaced(one, other)

    monkeypatch.setattr(os, "replace", in_use)
    folder.put(key, basis)
    folder.put(("another", "lq"), basis)
    assert not caplog.records and file.read_bytes() == good and len(list(tmp_path.iterdir())) == 2


def test_a_file_that_vanishes_while_it_is_opened_is_as_good_as_none(tmp_path, monkeypatch):
    filled(BasisCache(folder=tmp_path), some_weights(1))
    (file,) = tmp_path.glob(f"*{SUFFIX}")
    read = partial(BasisFolder(tmp_path, 1 << 20).get, (file.name.split(".")[0], "lq"), torch.Size((6, 9)))
    assert read() is not None
    utime = os.utime
    monkeypatch.setattr(os, "utime", lambda path: path.unlink() or utime(path))
    assert read() is not None and not file.exists()
    assert read() is None


def test_a_basis_is_its_file_mapped_and_outlives_it(tmp_path):
    """What is written to its tensors stays in memory, and no file is held open."""
    weights = some_weights(1)
    first = filled(BasisCache(folder=tmp_path), weights)["layer0"]
    (file,) = tmp_path.glob(f"*{SUFFIX}")
    good, get = file.read_bytes(), partial(BasisFolder(tmp_path, 1 << 20).get, (file.name.split(".")[0], "lq"), (6, 9))
    basis = get()
    basis.right.zero_()
    assert file.read_bytes() == good and same(get(), first) and not basis.right.any()
    basis = get()
    file.unlink()
    assert same(basis, first) and get() is None


def test_what_cannot_be_mapped_is_read(tmp_path, monkeypatch, computed):
    first = filled(BasisCache(folder=tmp_path), some_weights())

    def refused(*_, **__):
        raise RuntimeError("unable to mmap")

    monkeypatch.setattr(torch, "from_file", refused)
    again = filled(BasisCache(folder=tmp_path), some_weights())
    assert all(same(again[name], basis) for name, basis in first.items()) and len(computed) == 4


@pytest.mark.parametrize("decomposition", ["lq", "qr", "svd"])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5), (1, 9)])
def test_numbers_of_any_size_are_aligned(tmp_path, decomposition, shape):
    weights = some_weights(1, shape)
    first = filled(BasisCache(folder=tmp_path), weights, decomposition)
    assert same(filled(BasisCache(folder=tmp_path), weights, decomposition)["layer0"], first["layer0"])


def test_the_folder_is_bounded_and_the_longest_unused_go_first(tmp_path):
    weights = some_weights(40)
    bases = {name: decompose(w, "lq").kept() for name, w in weights.items()}
    folder = BasisFolder(tmp_path, 1)
    folder.put(("layer0", "lq"), bases["layer0"])
    assert not any(tmp_path.iterdir())
    one = basis_folder.CHECKSUM + bases["layer0"].nbytes
    folder = BasisFolder(tmp_path, 10 * one)
    for age, name in enumerate(weights):
        folder.put((name, "lq"), bases[name])
        os.utime(tmp_path / f"{name}.lq{SUFFIX}", (1e9 + age, 1e9 + age))
        assert size_on_disk(tmp_path) <= 10 * one
        if age == 5:
            assert folder.get(("layer0", "lq"), torch.Size((6, 9))) is not None  # used now: newer than all
    kept = {f.name.split(".")[0] for f in tmp_path.iterdir()}
    assert 7 <= len(kept) <= 10 and "layer39" in kept and "layer0" in kept
    assert {f"layer{i}" for i in range(39 - len(kept) + 2, 40)} == kept - {"layer0"}


def test_two_writers_together_keep_the_bound(tmp_path):
    basis = decompose(some_weights(1)["layer0"], "lq").kept()
    one = basis_folder.CHECKSUM + basis.nbytes
    writers = [BasisFolder(tmp_path, 20 * one) for _ in range(2)]
    for i in range(60):
        writers[i % 2].put((f"layer{i}", "lq"), basis)
        assert size_on_disk(tmp_path) <= 20 * one
    assert size_on_disk(tmp_path) > 10 * one


def test_what_a_killed_writer_left_is_swept(tmp_path):
    old, new, foreign = (tmp_path / n for n in (f"a{SUFFIX}.part", f"b{SUFFIX}.part", "c.part"))
    for file in (old, new, foreign):
        file.write_bytes(b"x")
        os.utime(file, (time.time() - (7200 if file != new else 0),) * 2)
    BasisFolder(tmp_path, 1 << 20).put(("layer0", "lq"), decompose(some_weights(1)["layer0"], "lq").kept())
    assert not old.exists() and new.exists() and foreign.exists()


def broken_folders(tmp_path, monkeypatch):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    yield blocker / "inside"

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(basis_folder.os, "replace", full)
    yield tmp_path / "full"


def test_a_folder_that_cannot_be_written_does_not_fail_the_job(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    for folder in broken_folders(tmp_path, monkeypatch):
        caplog.clear()
        weights = some_weights()
        cache = BasisCache(folder=folder)
        found = filled(cache, weights)
        assert all(near(found[name], decompose(w, "lq")) for name, w in weights.items())
        assert len(caplog.records) == 1 and str(folder) in caplog.text
        assert not folder.exists() or not any(folder.iterdir())
        assert cache.size > 0  # kept in memory all the same


def _fill(folder, seed, rounds):
    """Write and read in a folder too small for all; exit code 1 if a basis ever came back wrong."""
    torch.set_num_threads(1)
    basis_folder.QUIET = 0.0
    weights = some_weights(12, (20, 20))
    exact = {name: decompose(w, "lq").kept() for name, w in weights.items()}
    one = exact["layer0"].nbytes + 2 * basis_folder.CHECKSUM
    g = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        cache = BasisCache(memory=0, folder=folder, disk=6 * one)
        names = [f"layer{i}" for i in torch.randperm(12, generator=g)[:5].tolist()]
        for name, basis in cache.bases({n: weights[n] for n in names}, "lq"):
            if not all(torch.allclose(a.float(), b.float(), atol=1e-3) for a, b in zip(
                (basis.right, basis.spectrum), (exact[name].right, exact[name].spectrum), strict=True
            )):  # fmt: skip
                raise SystemExit(1)


def test_processes_share_a_folder(tmp_path):
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=_fill, args=(tmp_path, seed, 25)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    left = list(tmp_path.iterdir())
    assert left and all(file.name.endswith(SUFFIX) for file in left)


def test_writing_waits_until_no_more_bases_come_but_not_for_ever(tmp_path, monkeypatch):
    basis = decompose(some_weights(1)["layer0"], "lq").kept()
    folder = BasisFolder(tmp_path, 1 << 20)
    monkeypatch.setattr(basis_folder, "QUIET", 3.0)
    for i in range(6):
        folder.put_later((f"layer{i}", "lq"), basis, room=1 << 20)
        time.sleep(0.2)
    assert not list(tmp_path.iterdir())
    assert folder.get(("layer3", "lq"), torch.Size((6, 9))) is basis  # as good as written
    told = []
    for name in ("layer3", "no layer"):
        folder.when_held((name, "lq"), torch.Size((6, 9)), partial(told.append, name))
    assert not told
    until = time.monotonic() + 30
    while time.monotonic() < until and len(list(tmp_path.glob(f"*{SUFFIX}"))) < 6:
        time.sleep(0.05)
    folder.flush()
    folder.when_held(("layer4", "lq"), torch.Size((6, 9)), partial(told.append, "layer4"))
    assert told == ["layer3", "layer4"]
    monkeypatch.setattr(basis_folder, "LATEST", 0.5)
    more = 0
    while time.monotonic() < until and not (tmp_path / f"more0.lq{SUFFIX}").exists():
        folder.put_later((f"more{more}", "lq"), basis, room=1 << 20)
        more += 1
        time.sleep(0.1)
    assert time.monotonic() < until
    folder.flush()


def test_where_little_may_wait_writing_begins_at_once_and_where_nothing_is_kept_nothing_waits(tmp_path, monkeypatch):
    for bound in ("QUIET", "LATEST"):
        monkeypatch.setattr(basis_folder, bound, 600.0)
    basis = decompose(some_weights(1)["layer0"], "lq").kept()
    folder, until = BasisFolder(tmp_path, 1 << 20), time.monotonic() + 30
    for i in range(12):
        folder.put_later((f"layer{i}", "lq"), basis, room=4 * basis.nbytes)
        while i % 4 == 3 and not all(future.done() for _, future in folder._later):
            assert time.monotonic() < until
            time.sleep(0.01)
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 12
    folder.put_later(("layer12", "lq"), basis, room=4 * basis.nbytes)
    folder.bound(0)
    folder.put_later(("layer13", "lq"), basis, room=4 * basis.nbytes)
    assert not list(tmp_path.iterdir()) and not folder._waiting and not folder._later


def test_what_would_wait_too_long_is_not_written_and_the_rest_is_before_the_process_ends(tmp_path, monkeypatch):
    basis, going, written = decompose(some_weights(1)["layer0"], "lq").kept(), threading.Event(), []
    plain = BasisFolder.put

    def slow(folder, key, basis):
        going.wait()
        plain(folder, key, basis)
        written.append(key[0])

    monkeypatch.setattr(BasisFolder, "put", slow)
    folder = BasisFolder(tmp_path, 1 << 20)
    for i in range(5):
        folder.put_later((f"layer{i}", "lq"), basis, room=3 * basis.nbytes)
    assert not written
    going.set()
    folder.flush()
    folder.put_later(("layer5", "lq"), basis, room=3 * basis.nbytes)
    folder.flush()
    assert sorted(written) == ["layer0", "layer1", "layer2", "layer5"]
    assert same(folder.get(("layer5", "lq"), torch.Size((6, 9))), basis)

    code = (
        "import torch, sys, soda.basis_folder as f, time; from soda import decompose; plain = f._write\n"
        "f._write = lambda *args: (time.sleep(0.5), plain(*args)); f.QUIET = 0.1\n"
        "folder = f.BasisFolder(sys.argv[1], 1 << 20)\n"
        "folder.put_later(('late', 'lq'), decompose(torch.randn(6, 9), 'lq').kept(), 1 << 20)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
    assert folder.get(("late", "lq"), torch.Size((6, 9))) is not None
