"""Official `.pt` tables, re-created as the authors' script saves them, become adapters of the same effect."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from small_sd import base_weights, modules, save_base
from torch import nn

from soda.adapt import adapt
from soda.convert import BaseWeights, read_official
from soda.decomposition import decompose
from soda.errors import SodaFileError
from soda.file import load, save
from soda.fingerprint import base_hash, sketch
from soda.kronecker import factor_sizes

ENCODER = "text_model.encoder.layers.{}.self_attn.{}_proj.weight"


def projection(shape, seed, noise=0.0):
    """(Q1, Q2, Q3, delta) of one projection as trained: almost orthogonal factors, any delta."""
    g = torch.Generator().manual_seed(seed)
    factors = []
    for n in factor_sizes(shape[1], 3):
        a = 0.3 * torch.randn(n, n, generator=g, dtype=torch.float64)
        factors.append(torch.linalg.matrix_exp(a - a.mT).float() + noise * torch.randn(n, n, generator=g))
    return (*factors, 0.5 * torch.randn(min(shape), generator=g))


def table(noise=0.0):
    """The script's table: for every projection four one-element lists of parameters; empty text encoders."""
    unet = []
    for seed, (_, _, shape) in enumerate(modules()):
        unet += [[nn.Parameter(tensor)] for tensor in projection(shape, seed, noise)]
    return {"unet": unet, "text_encoder_one": [], "text_encoder_two": []}


def kron(factors):
    return torch.kron(torch.kron(factors[0], factors[1]), factors[2])


@pytest.fixture
def base(tmp_path):
    weights = base_weights()
    save_base(tmp_path / "base.safetensors", weights)
    return weights, BaseWeights(tmp_path / "base.safetensors")


def test_svd_tables_keep_their_effect(tmp_path, base):
    """W = U relu(S + delta) V^T R^T, written out in fp64."""
    weights, file = base
    torch.save(table(), tmp_path / "style.pt")
    steps: list[tuple[int, int]] = []
    adapter = read_official(tmp_path / "style.pt", file, progress=lambda *step: steps.append(step))
    assert steps == [(i, 128) for i in range(1, 129)]
    assert list(adapter.layers) == [f"diffusion_model.{ldm}" for ldm, _, _ in modules()]
    for seed, (name, (term,)) in enumerate(adapter.layers.items()):
        weight = weights[name]
        *factors, delta = (tensor.double() for tensor in projection(weight.shape, seed))
        u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        expected = u @ torch.diag((s + delta).clamp(min=0)) @ vt @ kron(factors).mT
        basis = decompose(weight, "svd")
        assert (adapt(weight, [term], {"svd": basis}) - expected).norm() < 1e-5 * expected.norm()
        assert (term.delta >= -basis.spectrum).all()
    assert adapter.metadata["soda.base_hash"] == base_hash(weights)
    assert adapter.metadata["modelspec.architecture"] == "stable-diffusion-v1/soda" and adapter.name == "style"


def test_lq_tables_keep_their_effect(tmp_path, base):
    """W^T = R Q (T + diag delta) with LAPACK's signs, written out."""
    weights, file = base
    torch.save(table(), tmp_path / "style.pt")
    adapter = read_official(tmp_path / "style.pt", file, "lq")
    flipped = 0
    for seed, (name, (term,)) in enumerate(adapter.layers.items()):
        weight = weights[name]
        *factors, delta = (tensor.double() for tensor in projection(weight.shape, seed))
        if weight.shape[0] > weight.shape[1]:  # the script itself fails there: its delta has `out` numbers
            continue
        q, t = torch.linalg.qr(weight.double().mT)
        flipped += int((t.diagonal() < 0).sum())
        expected = (kron(factors) @ q @ (t + torch.diag(delta))).mT
        assert (adapt(weight, [term], {"lq": decompose(weight, "lq")}) - expected).norm() < 1e-5 * expected.norm()
    assert flipped > 100


def test_drifted_factors_become_rotations_and_the_file_round_trips(tmp_path, base):
    weights, file = base
    torch.save(table(noise=1e-3), tmp_path / "style.pt")
    adapter = read_official(tmp_path / "style.pt", file)
    save(adapter, tmp_path / "style.safetensors")
    assert load(tmp_path / "style.safetensors").content_hash == adapter.content_hash
    name, (term,) = next(iter(adapter.layers.items()))
    weight = weights[name]
    turned = adapt(weight, [term], {"svd": decompose(weight, "svd")})
    *factors, delta = (tensor.double() for tensor in projection(weight.shape, 0, 1e-3))
    u, s, vt = torch.linalg.svd(weight.double())
    change = u @ torch.diag((s + delta).clamp(min=0) - s) @ vt
    singular = torch.linalg.svdvals(turned.double())
    assert (singular - (s + delta).clamp(min=0).sort(descending=True).values).abs().max() < 1e-5
    assert (term.sketch - sketch(change)).abs().max() < 1e-4


def test_text_encoders(tmp_path):
    """CLIPAttention lists k, v, q, out; the second encoder is fused in a checkpoint."""
    g = torch.Generator().manual_seed(0)
    small, large = 12, 16
    weights = {f"model.{name}.weight": weight for name, weight in base_weights().items()}
    for part in ("k", "v", "q", "out"):
        key = ENCODER.format(0, part)
        weights[f"conditioner.embedders.0.transformer.{key}"] = torch.randn(small, small, generator=g)
    fused = torch.randn(3 * large, large, generator=g)
    weights["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"] = fused
    out = torch.randn(large, large, generator=g)
    weights["conditioner.embedders.1.model.transformer.resblocks.0.attn.out_proj.weight"] = out
    save_file(weights, tmp_path / "checkpoint.safetensors")
    content = table()
    for name, width in (("text_encoder_one", small), ("text_encoder_two", large)):
        for seed in range(4):
            content[name] += [[nn.Parameter(tensor)] for tensor in projection((width, width), seed)]
    torch.save(content, tmp_path / "style.pt")
    base = BaseWeights(tmp_path / "checkpoint.safetensors")
    adapter = read_official(tmp_path / "style.pt", base)
    layer = "clip_{}.transformer.text_model.encoder.layers.0.self_attn.{}_proj"
    assert list(adapter.layers)[-8:] == [layer.format(e, p) for e in "lg" for p in ("k", "v", "q", "out")]
    assert torch.equal(base[layer.format("g", "k")], fused[large : 2 * large])
    assert torch.equal(base[layer.format("g", "out")], out)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def changed(position, entry):
    content = table()
    content["unet"][position] = entry
    return content


def more(**entries):
    return table() | entries


NOT_TENSORS = {
    "code": (changed(5, Bomb()), "more than tensors"),
    "code beside the tables": (more(extra=Bomb()), "more than tensors"),
    "a module": (nn.Linear(2, 2), "more than tensors"),
    "a string": (changed(5, "x"), r"unet\[5\] is a str"),
    "a number": (changed(5, 1.0), r"unet\[5\] is a float"),
    "nothing": (changed(5, None), r"unet\[5\] is a NoneType"),
    "two tensors": (changed(5, [torch.eye(2), torch.eye(2)]), r"unet\[5\] is a list"),
    "integers": (changed(5, torch.eye(2, dtype=torch.int32)), r"unet\[5\]"),
    "sparse": (changed(5, torch.eye(2).to_sparse()), r"unet\[5\]"),
    "complex": (changed(5, torch.eye(2, dtype=torch.complex64)), r"unet\[5\]"),
    "another table": (more(optimizer=[torch.eye(2)]), "'optimizer'.*expected tables"),
    "a list": ([torch.eye(2)], "holds list"),
    "settings": (more(text_encoder_one={"lr": 1}), "'text_encoder_one' is a dict"),
    "empty": ({"unet": [], "text_encoder_one": [], "text_encoder_two": []}, "empty"),
    "short": ({"unet": table()["unet"][:-1]}, "511 tensors, expected 512"),
    "factor not square": (changed(4, torch.eye(2, 3)), r"unet\[4\], factor 1.*\(2, 3\), expected \(n, n\)"),
    "factor of no divisor": (changed(5, torch.eye(3)), r"unet\[5\].*divisor of the weight's 8 inputs"),
    "factors too small": (changed(4, torch.eye(1)), r"unet\[4\].*multiply to 4, expected the 8 inputs"),
    "delta": (changed(7, torch.zeros(9)), r"unet\[7\], delta.*\(9,\), expected \(8,\)"),
    "nan": (changed(6, torch.full((2, 2), float("nan"))), r"unet\[6\].*NaN"),
    "summed factors": (changed(4, 2 * torch.eye(2)), r"unet\[4\].*no rotation"),
    "reflection": (changed(4, torch.diag(torch.tensor([1.0, -1.0]))), r"unet\[4\].*reflection"),
    "endless": (changed(4, torch.zeros(1).expand(1 << 20, 1 << 20)), r"unet\[4\].*divisor"),
    "text encoder without base": (more(text_encoder_one=[torch.eye(2)] * 4), "text_encoder_one.*full checkpoint"),
}


@pytest.mark.parametrize("case", NOT_TENSORS)
def test_anything_else_is_refused(tmp_path, base, monkeypatch, case):
    content, message = NOT_TENSORS[case]
    torch.save(content, tmp_path / "style.pt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SodaFileError, match=message) as error:
        read_official("style.pt", base[1])
    assert ";" in str(error.value) and not os.path.exists("exploded")


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 nothing", b"\x80\x02.", pickle.dumps(Bomb()), b"text"])
def test_files_that_torch_cannot_read(tmp_path, base, monkeypatch, data):
    (tmp_path / "style.pt").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SodaFileError, match="style.pt.*;"):
        read_official("style.pt", base[1])
    with pytest.raises(SodaFileError, match="no such file"):
        read_official("missing.pt", base[1])
    assert not os.path.exists("exploded")
