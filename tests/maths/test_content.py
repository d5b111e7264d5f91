"""What tells weights apart: hashes of all numbers, samples of some."""

import hashlib

import numpy as np
import pytest
import torch

from soda import content
from soda.content import samples, weight_hash, weight_hashes
from soda.fingerprint import random_words

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def normal(*shape, dtype=torch.float16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def by_definition(weight):
    """hash(W) in unsigned integers, all pieces at once."""
    numbers = weight.contiguous().view(torch.uint8).numpy().tobytes()
    words = np.frombuffer(numbers + bytes(-len(numbers) % 4096), np.uint32).reshape(-1, 1024)
    factors = random_words(1024, seed=3).numpy().view(np.uint64)
    sums = (words.view(np.int32).astype(np.int64).view(np.uint64) * factors).sum(1)
    return hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode() + sums.tobytes()).hexdigest()


@pytest.mark.parametrize("device", DEVICES)
def test_a_hash_is_what_it_is_defined_as_on_every_device(device, monkeypatch):
    monkeypatch.setattr(content, "AT_ONCE", 4096)
    kinds = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]
    weights = [normal(*shape, dtype=kind) for shape in [(64, 128), (3, 5), (0, 4), (129, 67)] for kind in kinds]
    found = weight_hashes({str(i): w.to(device) for i, w in enumerate(weights)})
    assert list(found.values()) == [by_definition(w) for w in weights]
    assert weight_hashes({}) == {}


def test_the_hash_knows_numbers_shape_and_type():
    w = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    others = [w.reshape(4, 3), w.half(), w.bfloat16(), w + 1e-6 * w, -w, w.mT]
    assert len({weight_hash(t) for t in (w, *others)}) == 7
    assert weight_hash(w.mT.contiguous().mT) == weight_hash(w.clone()) == weight_hash(w)
    assert weight_hash(w.to(torch.float8_e4m3fn)) != weight_hash(w)


def test_any_bit_and_any_order_counts():
    """Also the sign bits, of which a product keeps the least, and numbers, pieces and their pairs that swap places."""
    w = normal(64, 128)
    seen = {weight_hash(w)}
    for place in range(0, 64 * 128, 331):
        for bit in range(16):
            changed = w.clone()
            changed.view(-1).view(torch.int16)[place] ^= -(1 << 15) if bit == 15 else 1 << bit
            seen.add(weight_hash(changed))
    for order in ([1, 0, *range(2, 64)], [*range(16, 32), *range(16), *range(32, 64)], list(reversed(range(64)))):
        seen.add(weight_hash(w[order]))
    both = w.clone()
    both.view(-1).view(torch.int16)[:2] ^= -(1 << 15)
    seen.add(weight_hash(both))
    assert len(seen) == 1 + len(range(0, 64 * 128, 331)) * 16 + 4


def test_rows_of_a_fused_weight_hash_like_a_copy():
    fused = normal(3, 7, dtype=torch.float8_e4m3fn)
    assert weight_hash(fused[1:]) == weight_hash(fused[1:].clone())


def test_a_sample_sees_every_part_of_a_weight():
    """Also where the width divides a fixed step: numbers of few columns would be seen otherwise."""
    w = torch.zeros(1280, 1280)
    for place in (slice(100, 140), slice(1200, 1280)):
        changed = w.clone()
        changed[place] = 1
        first, *others = samples([w, changed, changed.mT.contiguous(), w.half(), w.view(640, 2560)])
        assert first not in others and [first] == samples([w.clone()])
