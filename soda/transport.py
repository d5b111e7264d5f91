"""An adapter for another base than the one it was trained on: the same rotation, the spectrum fitted anew.

An adapter holds D(delta) in the base's own directions, so that on another base the same delta makes another D. Fitted
is the delta' there whose D' is nearest to what D was on the base a that it was trained on:

    delta' = argmin || D_b(delta') - D_a(delta) ||,      delta'_i = <D_a, E_i>  with orthonormal directions E_i of b
    lq   E_i = e_i q_i       qr   E_i = q_i e_i^T        svd   E_i = u_i v_i^T, delta' held at >= -sigma

    kept = 1 - || D' - D_a ||^2 / || D_a ||^2,           = || D' ||^2 / || D_a ||^2 where nothing is held back

What is not kept has no place in the directions of b: only the full change of the weights (`convert.export`) has it all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from .adapter import Adapter, Layer
from .decomposition import Basis, decompose, spectral_change, spectral_sketch
from .errors import SodaMixError
from .fingerprint import base_hash, relative_error
from .fit import REFUSED_ERROR, misfit

Progress = Callable[[int, int], None]


class Weights(Protocol):
    """Whatever gives a weight by its layer's name."""

    def __getitem__(self, layer: str, /) -> Tensor: ...


def transport(
    adapter: Adapter, original: Weights, target: Weights, base_name: str,
    device: torch.device | str = "cpu", progress: Progress | None = None,
) -> tuple[Adapter, float]:  # fmt: skip
    """(the adapter for `target`, kept share of ||D||^2 over all layers; 1 without a spectrum).

    original, target: weights `(out, in)` by layer name, of the base trained on and of the one to use. `base_name` is
    what the new file calls its base. Raises SodaMixError if a layer does not fit one of the two, or if `original` is
    not the base that the adapter was trained on.
    """
    layers: dict[str, tuple[Layer, ...]] = {}
    sketches: list[tuple[Tensor, Tensor]] = []
    lost = whole = 0.0
    for done, (name, terms) in enumerate(adapter.layers.items(), 1):
        here, there = (weights[name].to(device, torch.float32) for weights in (original, target))
        for weight in (here, there):
            reason = misfit(terms, weight.shape)
            if reason is not None:
                raise SodaMixError(
                    f"layer {name!r} of {adapter.name!r} does not fit: {reason}; give models of its kind"
                )
        moved = []
        for term in terms:
            if term.delta is None:
                moved.append(term)
                continue
            source, basis = decompose(here, term.decomposition), decompose(there, term.decomposition)
            assert source is not None and basis is not None
            wanted = spectral_change(source, term.delta.to(device), here)
            if term.sketch is not None:
                sketches.append((spectral_sketch(source, term.delta), term.sketch))
            delta = fitted(basis, wanted)
            change = spectral_change(basis, delta, there)
            lost += float((change - wanted).square().sum())
            whole += float(wanted.square().sum())
            moved.append(replace(term, delta=delta.cpu(), sketch=spectral_sketch(basis, delta)))
        layers[name] = tuple(moved)
        if progress is not None:
            progress(done, len(adapter.layers))
    error = relative_error(sketches)
    if error is not None and error > REFUSED_ERROR:
        trained_on = adapter.metadata.get("soda.base_model") or "another base"
        raise SodaMixError(
            f"{adapter.name!r} was trained on other weights ({trained_on}) than those given as the original: its "
            f"spectrum is off by about {error:.0%} there. Give the base that it was trained on"
        )
    kept = 1 - lost / whole if whole else 1.0
    metadata = dict(adapter.metadata) | {
        "soda.base_model": base_name,
        "soda.base_hash": base_hash({name: target[name] for name in adapter.layers}),
        "soda.transported": json.dumps({
            "from": adapter.metadata.get("soda.base_model", ""), "kept": round(kept, 4), "hash": adapter.content_hash,
        }),
    }  # fmt: skip
    return Adapter(layers, metadata, adapter.name), kept


def fitted(basis: Basis, change: Tensor) -> Tensor:
    """The delta `(k,)` whose D on the weight `(out, in)` of this basis is nearest to the change `(out, in)`."""
    k = basis.spectrum.numel()
    if basis.decomposition == "svd":
        assert basis.left is not None and basis.right is not None
        delta = torch.einsum("ok,oi,ki->k", basis.left, change, basis.right)
        delta = torch.maximum(delta, -basis.spectrum)
    elif basis.decomposition == "lq":
        assert basis.right is not None
        delta = (change[:k] * basis.right).sum(1)
    else:
        assert basis.left is not None
        delta = (change[:, :k] * basis.left).sum(0)
    return torch.where(basis.live, delta, 0.0)
