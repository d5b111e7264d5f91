"""What a GPU does otherwise than a CPU when weights are adapted; see conftest.py for when this is collected."""

from __future__ import annotations

from functools import lru_cache

import comfy.model_management
import pytest
import torch
from comfy.lora import calculate_weight
from comfy.model_patcher import ModelPatcher
from small_models import adapter, small_model
from soda_pack.soda.adapt import adapt
from soda_pack.soda.bases import to_keep
from soda_pack.soda.basis_folder import BasisFolder
from soda_pack.soda.decomposition import decompose
from soda_pack.soda.hosts.comfy import pinned
from soda_pack.soda.hosts.comfy.patch import apply
from soda_pack.soda.hosts.comfy.pinned import vectors_on_device

DEVICE = comfy.model_management.get_torch_device()


@pytest.fixture(scope="module")
def model() -> ModelPatcher:
    """With projections of 320 and 640 channels, in fp16."""
    made = small_model(width=320, dtype=torch.float16)
    return ModelPatcher(made.model, load_device=DEVICE, offload_device=torch.device("cpu"))


def errors(model, decomposition: str, dtype: torch.dtype, size: float = 0.05) -> list[float]:
    """How far each adapted weight is off, in terms of its change; that of the first time and twice again."""
    one = adapter(model, size=size, decomposition=decomposition)
    patched = apply(model, [(one, 0.8)])[0]
    base = {key: model.model_state_dict()[key] for key in patched.patches}
    found = []
    for _ in range(3):
        for key, entries in patched.patches.items():
            weight = base[key].to(DEVICE, dtype, copy=True)
            adapted = calculate_weight(entries, weight, key, intermediate_dtype=dtype)
            layer, exact = one.layers[key.removesuffix(".weight")][0].scaled(0.8), base[key].double().to(DEVICE)
            bases = {} if decomposition == "none" else {decomposition: decompose(exact, decomposition, torch.float64)}
            wanted = adapt(exact, [layer], bases)
            found.append(float((adapted.double() - wanted).norm() / (wanted - exact).norm()))
    return found


@pytest.mark.parametrize("decomposition", ["none", "lq", "svd", "qr"])
def test_merged_weights_are_those_of_double_precision(model, decomposition):
    """The vectors of the third time come from pinned memory."""
    limit = 3e-6 if decomposition == "none" else 1e-3
    assert max(errors(model, decomposition, torch.float32)) < limit


@pytest.mark.parametrize("decomposition", ["none", "lq", "svd", "qr"])
def test_what_a_forward_adapts_in_half_precision_is_near(model, decomposition):
    """fp16 weights, of whose change of a tenth rounding the result alone costs 0.2 %; a spectrum travels in 8 bits."""
    limit = 5e-3 if decomposition == "none" else 1e-2
    found = errors(model, decomposition, torch.float16)
    assert max(found) < limit
    assert found[: len(found) // 3] == found[-len(found) // 3 :]  # all forwards are alike


@pytest.mark.parametrize("decomposition", ["lq", "svd"])
@pytest.mark.parametrize("mapped", [False, True])
def test_vectors_arrive_whole_wherever_they_are_sent_from(tmp_path, monkeypatch, decomposition, mapped):
    """A ring of less memory than they take, then memory that is pinned, a mapped file's or new."""
    monkeypatch.setattr(pinned, "SLOT", 1 << 14)
    monkeypatch.setattr(pinned, "_ring", lru_cache(pinned._Ring))
    weight = torch.randn(320, 640, generator=torch.Generator().manual_seed(0))
    made = to_keep(decompose(weight, decomposition))
    basis = made
    if mapped:
        folder = BasisFolder(tmp_path, 1 << 30)
        folder.put(("a weight", decomposition), made)
        basis = folder.get(("a weight", decomposition), weight.shape)
    assert torch.equal(vectors_on_device(basis, DEVICE, again=False)[1].cpu(), made.right)
    sources = []
    for _ in range(4):
        sent = vectors_on_device(basis, DEVICE, again=True)
        for there, held in zip(sent, (made.left, made.right), strict=True):
            assert (there is held is None) or torch.equal(there.cpu(), held)
        source = getattr(basis.right if basis.left is None else basis.left, pinned.SOURCE)
        sources.append((source.pinned, source.held.is_pinned()))
    assert sources == [(False, False)] + [(True, True)] * 3
    before = comfy.model_management.TOTAL_PINNED_MEMORY
    del basis, made, source, sent, held
    assert before > comfy.model_management.TOTAL_PINNED_MEMORY


def test_what_is_kept_of_a_change_is_pinned_while_it_is_new():
    there = torch.randint(255, (1 << 20,), dtype=torch.uint8, device=DEVICE)
    before = comfy.model_management.TOTAL_PINNED_MEMORY
    held = pinned.to_main_memory(there)
    assert held.is_pinned() and before + held.nbytes == comfy.model_management.TOTAL_PINNED_MEMORY
    assert all(torch.equal(pinned.on_device(held, DEVICE), there) for _ in range(3))
    del held
    assert before == comfy.model_management.TOTAL_PINNED_MEMORY
