"""Weights whose bases a cache keeps, and what tells two bases apart."""

import torch

from soda.basis_folder import SUFFIX


def some_weights(count=4, shape=(6, 9), seed=0):
    g = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(shape, generator=g) for i in range(count)}


def filled(cache, weights, decomposition="lq", **options):
    """All bases, and on disk what goes there."""
    found = dict(cache.bases(weights, decomposition, **options))
    cache.flush()
    return found


def same(a, b):
    one, two = a.tensors(), b.tensors()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def near(a, b):
    """The same but for rounding: of a batch unlike that of one matrix alone, and of lq and qr to fp16."""
    one, two = a.tensors(), b.tensors()
    return one.keys() == two.keys() and all(torch.allclose(one[n].float(), two[n].float(), atol=1e-3) for n in one)


def size_on_disk(folder):
    return sum(f.stat().st_size for f in folder.glob(f"*{SUFFIX}"))
