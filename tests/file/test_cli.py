"""`python -m soda`: what it prints, writes and returns; nothing but sentences on stderr."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_sd import adapter, base_weights, save_base
from test_official import table

from soda.cli import main
from soda.file import load, save
from soda.mixing import mix

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two adapters, a broken one, their base and an official table."""
    made = tmp_path_factory.mktemp("files")
    weights = base_weights()
    save_base(made / "base.safetensors", weights)
    save(adapter(weights, seed=1), made / "a.safetensors")
    save(adapter(weights, seed=2), made / "b.safetensors")
    (made / "bad.safetensors").write_bytes(b"no such thing")
    torch.save(table(), made / "official.pt")
    (made / "empty.pt").touch()
    (made / "folder").mkdir()
    return made


@pytest.fixture
def folder(files, tmp_path, monkeypatch):
    """Copies of them in the current folder."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(capsys, *arguments, code=0):
    """(stdout, stderr) of a command that must end with this code."""
    assert main(list(arguments)) == code
    out, err = capsys.readouterr()
    assert (err == "") == (code == 0) and err.count("\n") == (0 if code == 0 else 1)
    return out, err


def test_inspect(folder, capsys):
    out, _ = answer(capsys, "inspect", "a.safetensors", "b.safetensors")
    assert "128 layers, lq; style" in out and "base: narrow" in out and out.count("rotation:") == 2
    out, _ = answer(capsys, "inspect", "a.safetensors", "--json")
    (said,) = json.loads(out)
    one = load("a.safetensors")
    assert said["content_hash"] == one.content_hash and len(said["by_layer"]) == said["layers"] == 128
    assert said["metadata"]["soda.role"] == "style" and said["decompositions"] == ["lq"]


def test_the_angles_and_spectra_are_true(folder, capsys):
    """Against R itself: eigenangles of the dense Kronecker product."""
    (said,) = json.loads(answer(capsys, "inspect", "a.safetensors", "--json")[0])
    layers = load("a.safetensors").layers
    for entry in said["by_layer"][::13]:
        (term,) = layers[entry["name"]]
        rotation = torch.eye(1, dtype=torch.float64)
        for n, log in zip(term.sizes, term.logs, strict=True):
            a = torch.zeros(n, n, dtype=torch.float64)
            a[torch.triu_indices(n, n, 1).unbind()] = log.double()
            rotation = torch.kron(rotation, torch.linalg.matrix_exp(a - a.mT))
        angles = torch.linalg.eigvals(rotation).angle().rad2deg()
        assert entry["angle_largest"] == pytest.approx(float(angles.max()), rel=1e-6)
        assert entry["angle_rms"] == pytest.approx(float(angles.square().mean().sqrt()), rel=1e-6)
        assert entry["spectrum_rms"] == pytest.approx(float(term.delta.norm()) / len(term.delta) ** 0.5, rel=1e-6)
        assert tuple(entry["sizes"]) == term.sizes


def test_plot(folder, capsys):
    answer(capsys, "inspect", "a.safetensors", "--plot", "out.png")
    with Image.open("out.png") as image:
        picture = image.convert("RGB")
    counts = dict((colour, count) for count, colour in picture.getcolors(1 << 24))
    for colour in ((0x33, 0x66, 0xCC), (0xDC, 0x70, 0x00), (0x10, 0x96, 0x18), (0xA0, 0x28, 0x9B)):
        assert counts[colour] > 5000  # bars of q, k, v and out
    _, err = answer(capsys, "inspect", "a.safetensors", "b.safetensors", "--plot", "x.png", code=1)
    assert "give one" in err


def test_plot_without_pillow(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    _, err = answer(capsys, "inspect", "a.safetensors", "--plot", "x.png", code=1)
    assert "pip install pillow" in err


def test_validate(folder, capsys):
    assert answer(capsys, "validate", "a.safetensors")[0] == "a.safetensors: ok\n"
    out, err = answer(capsys, "validate", "a.safetensors", "bad.safetensors", code=1)
    assert out == "a.safetensors: ok\n" and "bad.safetensors" in err
    assert main(["validate", "--json", "a.safetensors", "bad.safetensors"]) == 1
    good, bad = json.loads(capsys.readouterr().out)
    assert good["ok"] and not bad["ok"] and "bad.safetensors" in bad["reason"]


@pytest.mark.parametrize(("parts", "weights"), [(["a.safetensors:0.5", "b.safetensors:-0.25"], (0.5, -0.25)),
                                                (["a.safetensors", "b.safetensors:1e-1"], (1.0, 0.1))])  # fmt: skip
def test_mix(folder, capsys, parts, weights):
    out, _ = answer(capsys, "mix", *parts, "-o", "mixed.safetensors", "--json")
    expected = mix([(load(f"{name}.safetensors"), weight) for name, weight in zip("ab", weights, strict=True)])
    found = load("mixed.safetensors")
    assert found.content_hash == expected.content_hash and found.metadata["modelspec.merged_from"] == "a, b"
    said = json.loads(out)
    assert said["bytes"] == Path("mixed.safetensors").stat().st_size and said["parts"][0]["weight"] == weights[0]


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("ties", {}),
        ("ties --density 0.2", {"density": 0.2}),
        ("dare --density 0.7 --seed 5", {"density": 0.7, "seed": 5}),
    ],
)
def test_mix_by_another_operator(folder, capsys, command, settings):
    operator, *options = command.split()
    answer(capsys, "mix", "a.safetensors", "b.safetensors", "-o", "m.safetensors", "--operator", operator, *options)
    expected = mix([(load(f"{name}.safetensors"), 1.0) for name in "ab"], operator=operator, **settings)
    found = load("m.safetensors")
    assert found.content_hash == expected.content_hash
    assert json.loads(found.metadata["soda.mix_operator"]) == {"operator": operator, **settings}


def test_convert_official(folder, capsys):
    answer(capsys, "convert", "official.pt", "--base", "base.safetensors", "-o", "c.safetensors")
    assert len(load("c.safetensors").layers) == 128
    as_lq = ("--decomposition", "lq", "--dtype", "fp16")
    answer(capsys, "convert", "official.pt", "--base", "base.safetensors", "-o", "l.safetensors", *as_lq)
    assert Path("l.safetensors").stat().st_size < Path("c.safetensors").stat().st_size
    assert {term.decomposition for (term,) in load("l.safetensors").layers.values()} == {"lq"}


def test_convert_to_diffusers_and_back(folder, capsys):
    answer(capsys, "convert", "a.safetensors", "--to", "diffusers", "-o", "there.safetensors")
    assert all(name.startswith("unet.") for name in load("there.safetensors").layers)
    answer(capsys, "convert", "there.safetensors", "-o", "back.safetensors")
    assert Path("back.safetensors").read_bytes() == Path("a.safetensors").read_bytes()


def test_convert_onto_another_base(folder, capsys):
    near = {name: w + 0.1 * torch.randn(w.shape) for name, w in base_weights().items()}
    save_base(folder / "near.safetensors", near)
    command = ["convert", "a.safetensors", "--base", "base.safetensors", "--onto", "near.safetensors"]
    assert main([*command, "-o", "moved.safetensors", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert 0.3 < told["spectrum_kept"] < 1 and told["layers"] == len(near)
    moved = load("moved.safetensors")
    assert moved.metadata["soda.base_model"] == "near" and set(moved.layers) == set(load("a.safetensors").layers)
    assert main([*command, "-o", "moved.safetensors"]) == 0
    assert "of the spectrum's change has a place in near.safetensors" in capsys.readouterr().out


def test_convert_to_what_loaders_read(folder, capsys):
    base = ("--base", "base.safetensors")
    answer(capsys, "convert", "a.safetensors", "--to", "diff", *base, "-o", "diff.safetensors")
    assert len(load_file("diff.safetensors")) == 128
    out, _ = answer(capsys, "convert", "a.safetensors", "--to", "lora", "--rank", "2", *base, "-o", "lora.safetensors")
    assert "%  of the change's energy is kept by rank 2" in out and out.count("%  diffusion_model.") == 128
    out, _ = answer(
        capsys, "convert", "a.safetensors", "--to", "lora", "--rank", "2", *base, "-o", "lora.safetensors", "--json"
    )
    said = json.loads(out)
    assert 0 < said["energy_kept"] < 1 and len(said["energy_kept_by_layer"]) == 128


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("inspect missing.safetensors", "no such file"),
        ("inspect bad.safetensors", "bad.safetensors"),
        ("mix a.safetensors:nan -o x.safetensors", "nan"),
        ("mix a.safetensors:x -o x.safetensors", "a.safetensors:x: 'x' is no weight; give a number"),
        ("mix C:a.safetensors -o x.safetensors", "C:a.safetensors: there is no such file"),
        ("mix a.safetensors b.safetensors -o b.safetensors", "would replace"),
        ("mix a.safetensors -o x.safetensors --density 0.5", "lie_sum has no setting 'density'"),
        ("mix a.safetensors -o x.safetensors --operator ties --seed 1", "ties has no setting 'seed'; it has density"),
        ("mix a.safetensors -o x.safetensors --operator dare --density 0", "more than 0 and at most 1"),
        ("mix a.safetensors -o x.safetensors --operator dare --density nan", "density is nan"),
        ("mix a.safetensors -o folder", "this is a folder, name a file in it"),
        ("inspect folder", "folder: this is a folder; choose an existing SODA adapter"),
        ("inspect a.safetensors --plot x.jpg", "ends in .png"),
        ("convert folder/a.pt --base base.safetensors -o x.safetensors", "no such file"),
        ("convert empty.pt --base base.safetensors -o x.safetensors", "empty or ends early"),
        ("convert a.safetensors --to diff --base folder -o x.safetensors", "folder: this is a folder"),
        ("convert official.pt -o x.safetensors", "--base"),
        ("convert a.safetensors --to lora -o x.safetensors", "--base"),
        ("convert a.safetensors --to lora --rank 0 --base base.safetensors -o x.safetensors", "rank 0"),
        ("convert a.safetensors --to diff --base missing.safetensors -o x.safetensors", "missing.safetensors"),
        ("convert a.safetensors --to diff --base base.safetensors -o base.safetensors", "would replace"),
        ("convert a.safetensors -o a.safetensors", "would replace"),
        ("convert a.safetensors --onto base.safetensors -o x.safetensors", "--base"),
        ("convert a.safetensors --to lora --base base.safetensors --onto x -o x.safetensors", "--to lora"),
        ("convert official.pt --base a.safetensors -o x.safetensors", "official.pt"),
        ("convert bad.safetensors -o bad/x.safetensors", "bad.safetensors"),
        ("convert a.safetensors -o bad.safetensors/x.safetensors", "cannot be written"),
    ],
)
def test_what_is_refused(folder, capsys, command, message):
    _, err = answer(capsys, *command.split(), code=1)
    assert message in err and err.startswith("soda: ") and not Path("x.safetensors").exists()


@pytest.mark.parametrize(
    "command",
    ["", "inspect", "mix a", "paint a", "mix a -o b --operator x", "mix a -o b --seed .5", "convert a -o b --device x"],
)
def test_what_is_not_understood(folder, capsys, command):
    with pytest.raises(SystemExit) as exit_:
        main(command.split())
    assert exit_.value.code == 2 and "usage" in capsys.readouterr().err


def test_as_a_module(folder):
    command = [sys.executable, "-m", "soda", "validate", "a.safetensors", "bad.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, cwd=folder)
    assert done.returncode == 1 and done.stdout == "a.safetensors: ok\n" and "Traceback" not in done.stderr
