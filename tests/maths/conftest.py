"""The library as package `soda`, and random weights, layers and adapters for its tests."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
settings.register_profile("ladder", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("ladder")
collect_ignore = [] if torch.cuda.is_available() else ["test_training_graph_cuda.py"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_layer():
    """make_layer(decomposition, shape, sizes, seed) -> a Layer of random numbers."""
    from soda.adapter import Layer

    def make(decomposition, shape, sizes, seed, angle=0.2):
        g = torch.Generator().manual_seed(seed)
        delta = None if decomposition == "none" else 0.1 * torch.randn(min(shape), generator=g)
        logs = tuple(angle * torch.randn(n * (n - 1) // 2, generator=g) for n in sizes)
        sketch = None if delta is None else torch.randn(8, 8, generator=g)
        return Layer(decomposition, delta, logs, sketch)

    return make


@pytest.fixture
def computed(monkeypatch):
    """The names of weights in the order in which a cache of bases decomposed them."""
    from soda import basis_cache

    names = []

    def counting(weights, *args, **kwargs):
        for batch in plain(weights, *args, **kwargs):
            names.extend(batch)
            yield batch

    plain = basis_cache.decompose_batches
    monkeypatch.setattr(basis_cache, "decompose_batches", counting)
    return names
