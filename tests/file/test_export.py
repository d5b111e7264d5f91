"""Full differences and LoRAs: what they hold, what they keep, and on which base they are refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from small_sd import adapter, base_weights, save_base

from soda.adapt import adapt
from soda.adapter import Adapter
from soda.convert import BaseWeights, save_difference, save_lora
from soda.convert.export import low_rank
from soda.decomposition import decompose
from soda.errors import SodaFileError
from soda.mixing import mix

KINDS = ["lq", "svd", "qr", "none"]


def lora_name(layer):
    """Of SD 1.x in diffusers' names, written out for the two blocks looked at."""
    path = layer.replace("diffusion_model.input_blocks.1.1", "down_blocks.0.attentions.0")
    path = path.replace("diffusion_model.middle_block.1", "mid_block.attentions.0")
    return "lora_unet_" + path.replace(".", "_")


LOOKED_AT = [f"diffusion_model.{block}.transformer_blocks.0.{path}" for block in ("input_blocks.1.1", "middle_block.1")
             for path in ("attn1.to_q", "attn2.to_k", "attn2.to_out.0")]  # fmt: skip


@pytest.fixture
def base(tmp_path):
    weights = base_weights()
    save_base(tmp_path / "base.safetensors", weights)
    return weights, BaseWeights(tmp_path / "base.safetensors")


def change_of(weights, layers, name):
    weight = weights[name]
    kinds = {term.decomposition for term in layers[name]}
    return adapt(weight, layers[name], {kind: decompose(weight, kind) for kind in kinds}) - weight


def about(path):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return json.loads(metadata["soda.export"]), metadata


@pytest.mark.parametrize("kind", KINDS)
def test_a_difference_is_the_change_of_every_weight(tmp_path, base, kind):
    weights, file = base
    one = adapter(weights, kind)
    steps: list[tuple[int, int]] = []
    told = save_difference(one, file, tmp_path / "diff.safetensors", torch.float32, "cpu", lambda *s: steps.append(s))
    tensors = load_file(tmp_path / "diff.safetensors")
    assert len(tensors) == len(weights) and steps == [(i, len(weights)) for i in range(1, len(weights) + 1)]
    for name in LOOKED_AT:
        assert torch.equal(tensors[f"{lora_name(name)}.diff"], change_of(weights, one.layers, name))
    written, metadata = about(tmp_path / "diff.safetensors")
    assert written == told and told["base"] == "base.safetensors" and metadata["soda.role"] == "style"
    assert "soda.format_version" not in metadata


def test_a_mix_without_a_common_form_can_be_baked(tmp_path, base):
    weights, file = base
    mixed = mix([(adapter(weights, "lq"), 0.5), (adapter(weights, "qr", 2), 1.0)])
    assert not mixed.is_single_form()[0]
    save_difference(mixed, file, tmp_path / "diff.safetensors", torch.float32)
    tensors = load_file(tmp_path / "diff.safetensors")
    for name in LOOKED_AT:
        assert torch.equal(tensors[f"{lora_name(name)}.diff"], change_of(weights, mixed.layers, name))


def test_rows_of_a_fused_weight_come_together(tmp_path, base):
    weights, file = base
    whole = LOOKED_AT[0]
    parts = {f"{whole}[0:4]": weights[whole][:4], f"{whole}[6:8]": weights[whole][6:]}
    one = adapter(parts)
    save_difference(one, file, tmp_path / "diff.safetensors", torch.float32)
    (diff,) = load_file(tmp_path / "diff.safetensors").values()
    assert torch.equal(diff[:4], change_of(parts, one.layers, f"{whole}[0:4]")) and not diff[4:6].count_nonzero()
    assert torch.equal(diff[6:], change_of(parts, one.layers, f"{whole}[6:8]"))


@pytest.mark.parametrize("rank", [1, 4, 100])
def test_a_lora_is_the_nearest_of_its_rank(tmp_path, base, rank):
    weights, file = base
    one = adapter(weights)
    told = save_lora(one, file, tmp_path / "lora.safetensors", rank, torch.float32)
    tensors = load_file(tmp_path / "lora.safetensors")
    assert len(tensors) == 3 * len(weights)
    for name in LOOKED_AT:
        u, s, vt = torch.linalg.svd(change_of(weights, one.layers, name).double(), full_matrices=False)
        nearest = u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank]
        up, down = (tensors[f"{lora_name(name)}.lora_{way}.weight"] for way in ("up", "down"))
        alpha = float(tensors[f"{lora_name(name)}.alpha"])
        assert up.shape[1] == len(down) == alpha == min(rank, len(s))  # scale alpha / rank = 1
        assert (up @ down - nearest).norm() < 1e-5 * s.norm()
        share = float(s[:rank].square().sum() / s.square().sum())
        assert told["energy_kept_by_layer"][name] == pytest.approx(share, abs=1e-4)
    whole = kept = 0.0
    for name in weights:
        change = change_of(weights, one.layers, name).double().square().sum()
        whole, kept = whole + change, kept + change * told["energy_kept_by_layer"][name]
    assert told["energy_kept"] == pytest.approx(float(kept / whole), abs=2e-4)
    written, metadata = about(tmp_path / "lora.safetensors")
    assert written == told and metadata["ss_network_dim"] == str(rank) and "soda.format_version" not in metadata


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(1, 12), st.integers(0, 5))
def test_low_rank_of_any_matrix(out, width, true_rank, rank, seed):
    """Rank-deficient, zero and tall ones: finite in fp16, and exact once the rank suffices."""
    g = torch.Generator().manual_seed(seed)
    matrix = torch.randn(out, true_rank, generator=g) @ torch.randn(true_rank, width, generator=g)
    up, down, share, energy = low_rank(matrix, rank)
    assert up.half().isfinite().all() and down.half().isfinite().all() and 0 <= share <= 1 + 1e-12
    singular = torch.linalg.svdvals(matrix.double())
    expected = singular[rank:].square().sum().sqrt()
    assert abs((up @ down - matrix).double().norm() - expected) < 1e-5 * (1 + singular.norm())
    assert energy == pytest.approx(float(singular.square().sum()), rel=1e-5, abs=1e-9)


def test_rank_64_of_a_rotation_keeps_a_third(tmp_path):
    """The trap that the share is there for, on one 1280 x 1280 layer."""
    weights = {
        "diffusion_model.input_blocks.7.1.x": torch.randn(1280, 1280, generator=torch.Generator().manual_seed(0))
    }
    save_base(tmp_path / "base.safetensors", weights)
    told = save_lora(adapter(weights, "none", size=0.05), BaseWeights(tmp_path / "base.safetensors"),
                     tmp_path / "lora.safetensors", 64)  # fmt: skip
    assert 0.15 < told["energy_kept"] < 0.5
    up = load_file(tmp_path / "lora.safetensors")["lora_unet_input_blocks_7_1_x.lora_up.weight"]
    assert up.shape == (1280, 64) and up.dtype == torch.float16


@pytest.mark.parametrize("rank", [0, -3])
def test_no_rank(tmp_path, base, rank):
    with pytest.raises(SodaFileError, match=f"rank {rank}"):
        save_lora(adapter(base[0]), base[1], tmp_path / "x.safetensors", rank)


def test_another_base_is_refused_by_the_sketches(tmp_path, base):
    weights, _ = base
    save_base(tmp_path / "other.safetensors", base_weights(seed=5))
    save_base(tmp_path / "near.safetensors", {name: w.half() for name, w in weights.items()})
    one = adapter(weights)
    with pytest.raises(SodaFileError, match=r"other.safetensors.*trained on other weights \(narrow\).*%"):
        save_difference(one, BaseWeights(tmp_path / "other.safetensors"), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    told = save_difference(one, BaseWeights(tmp_path / "near.safetensors"), tmp_path / "x.safetensors")
    assert 0 < told["spectrum_error"] < 0.1


def test_another_architecture_is_refused(tmp_path, base):
    wrong = {LOOKED_AT[0]: torch.randn(8, 12)}
    with pytest.raises(SodaFileError, match="base.safetensors.*attn1.to_q.*width 12"):
        save_difference(adapter(wrong), base[1], tmp_path / "x.safetensors")
    absent = Adapter({"diffusion_model.x": adapter(wrong).layers[LOOKED_AT[0]]}, {}, "x")
    with pytest.raises(SodaFileError, match="no weight for layer 'diffusion_model.x'"):
        save_lora(absent, base[1], tmp_path / "x.safetensors", 4)
