"""Recorded steps: which batches share a recording."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from soda.training.graph import _form, _mapped, _tensors


@dataclass(frozen=True)
class Part:
    x: torch.Tensor
    said: dict
    share: float


def batch(size: int = 4, share: float = 1.0, parts: int = 1, split: int = 1, value: float = 0.0):
    made = [Part(torch.full((size, 3), value), {"text": torch.zeros(2)}, share) for _ in range(parts)]
    return made[:split], made[split:]


def test_a_form_is_all_but_the_numbers_in_the_tensors():
    assert _form(batch(value=1.0)) == _form(batch(value=2.0))


@pytest.mark.parametrize("other", [{"size": 5}, {"share": 0.5}, {"parts": 2}, {"split": 0}])
def test_batches_of_other_forms_are_told_apart(other):
    assert _form(batch()) != _form(batch(**other))


def test_a_dtype_is_part_of_the_form():
    assert _form({"x": torch.zeros(2)}) != _form({"x": torch.zeros(2, dtype=torch.int32)})


def test_a_copy_has_tensors_of_its_own_in_the_same_order():
    given = batch(parts=3, split=2, value=3.0)
    held = _mapped(given, lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf)
    assert _form(held) == _form(given)
    mine, theirs = _tensors(held), _tensors(given)
    assert len(mine) == 6
    assert all(a is not b and torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
