"""Blocks computed again: gradients of a plain pass, almost nothing kept, no silent error after in-place writes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from soda.training.recompute import copying, recomputed


class Block(nn.Module):
    """x + f(x, context), in place or not, with a weight from outside and options in a dict."""

    def __init__(self, inside: bool, own: bool):
        super().__init__()
        self.inside, self.own = inside, own
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x, context=None, options=None):
        x = x.clone() if self.own else x
        y = self.down(torch.tanh(self.up(nn.functional.layer_norm(x, (6,))))) * options["size"]
        y = y + context[0]
        if self.inside:
            x += y
            return x
        return x + y


def gradients(inside=False, own=True, again=False, change=lambda context: None):
    torch.manual_seed(0)
    blocks = [Block(inside, own) for _ in range(3)]
    x = torch.randn(5, 6, requires_grad=True)
    context, options, kept = [torch.randn(5, 6, requires_grad=True)], {}, []
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        h = x * 1.0
        for i, block in enumerate(blocks):
            options["size"] = float(i + 1)  # as ComfyUI writes the block's number into a dict that all share
            h = recomputed(block, h, context, options=options) if again else block(h, context, options=options)
        change(context)
        (h**2).sum().backward()
    return [x.grad, context[0].grad, *(p.grad for block in blocks for p in block.parameters())], sum(kept)


def test_gradients_are_those_of_a_plain_pass_and_nothing_inside_is_kept():
    plain, kept = gradients()
    again, less = gradients(again=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert less < kept / 10


@pytest.mark.parametrize("own", [True, False])
def test_writing_in_place_is_noticed_and_copies_bear_it(own):
    plain, _ = gradients(inside=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(inside=True, own=own, again=True)
    with copying():
        again, _ = gradients(inside=True, own=own, again=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))


def test_an_argument_changed_afterwards_is_noticed():
    def change(context):
        with torch.no_grad():
            context[0].add_(1.0)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(again=True, change=change)


def test_without_gradients_it_is_a_plain_call():
    calls = []
    with torch.no_grad():
        assert recomputed(lambda x: calls.append(x) or x + 1, torch.zeros(1)) == 1
    assert len(calls) == 1


def test_a_part_may_be_copied_alone():
    """The copies follow the blocks that were called within `copying`, not the backward pass."""
    torch.manual_seed(0)
    block = Block(inside=True, own=False)
    options = {"size": 1.0}

    def gradient(again):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with copying():
            h = recomputed(block, x * 1.0, [x], options=options) if again else Block.forward(plain, x, [x], options)
        (h**2).sum().backward()
        return x.grad

    plain = Block(inside=False, own=False)
    plain.load_state_dict(block.state_dict())
    assert torch.allclose(gradient(True), gradient(False), atol=1e-6)


class Masked(torch.autograd.Function):
    """x + mean(mask), with a mask as torch's attention keeps it: rows of 77 numbers 80 apart, one for all heads."""

    seen: list[tuple] = []

    @staticmethod
    def forward(ctx, x, mask):
        padded = nn.functional.pad(mask, (0, -mask.shape[-1] % 16))[..., : mask.shape[-1]].expand(2, 4, -1, -1)
        ctx.save_for_backward(padded)
        return x + padded.mean()

    @staticmethod
    def backward(ctx, gradient):
        (mask,) = ctx.saved_tensors
        Masked.seen.append((mask.shape, mask.stride()[1:], mask))
        return gradient, None


@pytest.mark.parametrize("length", [77, 80])
def test_a_mask_that_is_kept_as_a_copy_lies_in_memory_as_it_did(length):
    """The backward pass of torch's attention on a GPU refuses others."""
    mask = torch.randn(1, 1, length, length)
    with copying():
        recomputed(Masked.apply, torch.zeros(3, requires_grad=True), mask).sum().backward()
    shape, strides, kept = Masked.seen.pop()
    assert shape == (2, 4, length, length) and strides == (0, 80, 1) and torch.equal(kept, mask.expand(shape))
    assert kept.untyped_storage().nbytes() == 4 * 80 * length
