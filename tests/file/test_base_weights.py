"""Base weights are found under the names of LDM, ComfyUI and diffusers, and read one by one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_sd import base_weights, save_base

from soda.convert import BaseWeights
from soda.errors import SodaFileError

ROOT = Path(__file__).resolve().parents[2]
LAYER = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize("names", ["checkpoint", "comfy", "ldm", "diffusers", "pipeline"])
def test_all_spellings_give_the_same_weights(tmp_path, names):
    weights = base_weights()
    save_base(tmp_path / "base.safetensors", weights, names)
    base = BaseWeights(tmp_path / "base.safetensors")
    assert set(base.attention()) == set(weights) == set(base) and len(base) == len(weights)
    for name, weight in weights.items():
        assert torch.equal(base[name], weight) and base.shape(name) == tuple(weight.shape)
    assert torch.equal(base[f"{LAYER}[2:5]"], weights[LAYER][2:5]) and base.shape(f"{LAYER}[2:5]") == (3, 8)


def test_half_precision_stays_as_it_is(tmp_path):
    save_base(tmp_path / "base.safetensors", {LAYER: torch.ones(2, 2, dtype=torch.float16)})
    assert BaseWeights(tmp_path / "base.safetensors")[LAYER].dtype == torch.float16


@pytest.mark.parametrize(
    ("tensor", "layer", "message"),
    [
        (torch.ones(4, 4), "diffusion_model.x", "no weight for layer 'diffusion_model.x'"),
        (torch.ones(4, 4), f"{LAYER}[2:5]", "more than the 4 rows"),
        (torch.ones(4, 4), f"{LAYER}[3:3]", "more than the 4 rows"),
        (torch.ones(4, 4, 1, 1), LAYER, r"\(4, 4, 1, 1\), a matrix"),
        (torch.ones(4, 4, dtype=torch.int8), LAYER, "I8.*fp16 or fp32"),
        (torch.ones(4, 4).to(torch.float8_e4m3fn), LAYER, "F8_E4M3.*fp16 or fp32"),
    ],
)
def test_what_is_no_base_of_a_layer(tmp_path, tensor, layer, message):
    save_base(tmp_path / "base.safetensors", {LAYER: tensor})
    base = BaseWeights(tmp_path / "base.safetensors")
    for read in (base.__getitem__, base.shape):
        with pytest.raises(SodaFileError, match=message):
            read(layer)


def test_what_is_no_base(tmp_path):
    (tmp_path / "base.ckpt").write_bytes(b"PK\x03\x04" + bytes(100))
    for name, what in (("base.ckpt", "cannot be read"), ("missing.safetensors", "no such file")):
        with pytest.raises(SodaFileError, match=f"{name}.*{what}.*;"):
            BaseWeights(tmp_path / name)


READ_ONE = """
import resource, sys; sys.path.insert(0, sys.argv[1])
from soda.convert import BaseWeights
base = BaseWeights(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in base: assert base.shape(name) == (2048, 2048)
assert float(base["diffusion_model.5"][0, 0]) == 5
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_only_what_is_asked_for_is_read(tmp_path):
    """One of ten weights of 16 MiB."""
    weights = {f"model.diffusion_model.{i}.weight": torch.full((2048, 2048), float(i)) for i in range(10)}
    save_file(weights, tmp_path / "base.safetensors")
    command = [sys.executable, "-c", READ_ONE, str(ROOT), str(tmp_path / "base.safetensors")]
    kibibytes = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert kibibytes < 60_000
