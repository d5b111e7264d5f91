"""Gradients through what ComfyUI's networks do for sampling alone: in-place residuals and fused kernels."""

from __future__ import annotations

import comfy_kitchen
import pytest
import torch
from comfy.ldm.flux.math import rope
from comfy_kitchen.backends.eager import rope as formulas
from soda_pack.soda.hosts.comfy.differentiable import FUSED, differentiated
from soda_pack.soda.training.recompute import recomputed


def test_an_inplace_residual_has_the_gradient_of_a_plain_one():
    w = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    calls = []

    def gradient(in_place):
        with torch.inference_mode(False), torch.enable_grad():
            weight = w.clone().requires_grad_()
            calls.append(in_place)
            x = torch.ones(4, 8) @ weight
            y = torch.nn.functional.layer_norm(x, (8,)) @ weight
            if in_place:
                x += y
            else:
                x = x + y
            (x**3).sum().backward()
            return weight.grad

    with pytest.raises(RuntimeError, match="inplace"):
        gradient(True)
    calls.clear()
    assert torch.equal(differentiated(lambda: gradient(True)), gradient(False))
    assert calls == [True, True, False]


@pytest.mark.parametrize("again", [False, True])
def test_what_is_written_into_a_given_tensor_has_the_gradient_of_a_plain_result(again):
    """As in ComfyUI 0.33's language models, also where a block is computed again in the backward pass."""
    w = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))

    def gradient(out):
        def block(x, weight):
            y = torch.nn.functional.layer_norm(x, (8,)) @ weight
            return torch.add(x, y, out=x) if out else torch.add(x, y)

        with torch.inference_mode(False), torch.enable_grad():
            weight = w.clone().requires_grad_()
            x = torch.ones(4, 8) @ weight
            (recomputed(block, x, weight) if again else block(x, weight)).pow(3).sum().backward()
            return weight.grad

    with pytest.raises(RuntimeError, match="out="):
        gradient(True)
    assert torch.equal(differentiated(lambda: gradient(True)), gradient(False))


def test_other_errors_are_not_swallowed():
    def fails():
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        differentiated(fails)


@pytest.mark.parametrize("name", FUSED)
def test_fused_kernels_have_the_derivative_of_their_formula(name):
    generator = torch.Generator().manual_seed(1)
    frequencies = rope(torch.arange(5.0)[None], 16, 10000)[:, None]  # (1, 1, tokens, 8, 2, 2)
    one = name.endswith("1")
    rotated = [torch.randn(2, 3, 5, 16, generator=generator) for _ in range(1 if one else 2)]
    scales = [torch.rand(16, generator=generator) + 0.5 for _ in rotated] if name.startswith("rms") else []
    upstream = [torch.randn(2, 3, 5, 16, generator=generator) for _ in rotated]

    def gradients(function):
        inputs = [t.clone().requires_grad_() for t in rotated]
        weights = [t.clone().requires_grad_() for t in scales]
        out = function(*inputs, frequencies, *weights)
        out = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(out, [*inputs, *weights], upstream)

    with torch.inference_mode(False), torch.enable_grad():
        found = differentiated(lambda: gradients(getattr(comfy_kitchen, name)))
        expected = gradients(getattr(formulas, name))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
