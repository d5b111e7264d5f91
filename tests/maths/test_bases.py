"""Many weights at once: batches, the order and number of calls, precision on devices that are slow or lack fp64."""

import math

import pytest
import torch

from soda import bases, precision
from soda.bases import decompose_all, working_bytes
from soda.decomposition import decompose
from soda.precision import CPU, has_fp64, is_fast_in_fp64, solver_device

SHAPES = [(6, 9), (9, 6), (8, 8)]


@pytest.fixture
def weights():
    g = torch.Generator().manual_seed(0)
    return {f"{shape}.{i}": torch.randn(shape, generator=g).to(torch.bfloat16) for i in range(5) for shape in SHAPES}


@pytest.fixture
def batches(monkeypatch):
    """The numbers of weights that were decomposed together."""
    sizes = []

    def counting(weight, *args):
        sizes.append(len(weight))
        return decompose(weight, *args)

    monkeypatch.setattr(bases, "decompose", counting)
    return sizes


@pytest.mark.parametrize("decomposition", ["lq", "svd", "qr"])
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_each_basis_is_the_one_of_its_weight_alone(weights, batches, decomposition, at_once):
    told = []
    working_set = at_once * max(working_bytes(torch.Size(shape), decomposition, CPU) for shape in SHAPES)
    found = decompose_all(
        weights, decomposition, working_set=working_set, progress=lambda done, total: told.append((done, total))
    )
    found = dict(found)
    assert found.keys() == weights.keys() and sum(batches) == 15 and len(batches) >= 3 * math.ceil(5 / at_once) / 2
    assert max(batches) >= min(at_once, 5) and told == [(i, 15) for i in range(1, 16)]
    for name, weight in weights.items():
        alone = decompose(weight, decomposition)
        for part, tensor in found[name].tensors().items():
            torch.testing.assert_close(tensor, alone.tensors()[part], rtol=1e-4, atol=1e-5)
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found[name].tensors().values()}
        assert sum(held.values()) == found[name].nbytes  # drops the batch


def test_a_batch_keeps_to_the_working_set(weights, batches):
    one = working_bytes(torch.Size((8, 8)), "lq", CPU)
    list(decompose_all({k: w for k, w in weights.items() if "(8, 8)" in k}, "lq", working_set=3 * one - 1))
    assert batches == [2, 2, 1]


def test_nothing_is_decomposed_before_it_is_asked_for(weights, batches):
    found = decompose_all(weights, "lq", working_set=1)
    assert batches == []
    next(found)
    assert batches == [1]
    assert list(decompose_all(weights, "none")) == [] and list(decompose_all({}, "lq")) == []


def test_bases_of_inference_tensors_can_be_trained_with():
    with torch.inference_mode():
        found = dict(decompose_all({"a": torch.randn(4, 6)}, "lq"))
    factor = torch.ones(4, requires_grad=True)
    (factor[:, None] * found["a"].right).sum().backward()


@pytest.mark.parametrize("ratio, fast", [(1.0, True), (7.9, True), (8.1, False), (64.0, False)])
def test_a_device_is_fast_in_fp64_up_to_8_times_the_time(monkeypatch, ratio, fast):
    times = {torch.float32: 1.0, torch.float64: ratio}
    monkeypatch.setattr(precision, "has_fp64", lambda device: True)
    monkeypatch.setattr(precision, "_seconds", lambda run, repeats: times[run.args[0].dtype])
    assert is_fast_in_fp64.__wrapped__(torch.device("meta")) == fast


def test_where_a_device_is_slow_or_lacks_fp64(monkeypatch):
    gpu, cleared = torch.device("cuda", 7), [has_fp64, is_fast_in_fp64, solver_device]
    assert solver_device(CPU, "svd") == CPU and has_fp64(CPU) and is_fast_in_fp64(CPU)
    assert not has_fp64(torch.device("meta")) and solver_device(torch.device("meta"), "lq") == CPU
    for function in cleared:
        function.cache_clear()
    monkeypatch.setattr(precision, "has_fp64", lambda device: True)
    monkeypatch.setattr(precision, "is_fast_in_fp64", lambda device: device == CPU)
    monkeypatch.setattr(precision, "_eigenvalue", lambda gram: 0.0)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, place: self)
    times = iter([2.0, 1.0])
    monkeypatch.setattr(precision, "_seconds", lambda run, repeats: next(times))
    assert solver_device(gpu, "lq") == gpu and solver_device(gpu, "svd") == CPU
    assert solver_device(gpu, "svd") == CPU  # measured once
    solver_device.cache_clear()
    times = iter([1.0, 2.0])
    assert solver_device(gpu, "svd") == gpu
    solver_device.cache_clear()
