"""An adapter as other tools read it: the full change of every weight, or its best approximation of low rank.

    dW = (W0 + D) R^T - W0                    <layer>.diff                         as large as the weights
    dW ~ up down, r columns and rows          <layer>.lora_up / lora_down / alpha  r (out + in) numbers

A rotation changes a weight in all directions, so dW has no low rank: on trained SDXL-size layers rank 64 keeps about
a third of its energy ||dW||^2. What is kept is measured, layer by layer, and written into the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..adapt import adapt
from ..adapter import Adapter, Decomposition, split_rows
from ..atomic import replace_file
from ..decomposition import Basis, decompose, spectral_sketch
from ..errors import SodaFileError
from ..fingerprint import relative_error
from ..fit import REFUSED_ERROR, misfit
from .base import Progress, Weights
from .names import architecture, kohya


def save_difference(
    adapter: Adapter, base: Weights, path: str | os.PathLike, dtype: torch.dtype = torch.float16,
    device: str = "cpu", progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the full change of every weight. Returns what the file's metadata say of it. `progress` is called with
    the number of weights done and of all.

    Raises SodaFileError if the adapter does not fit the base or was trained on another one.
    """
    changes = Changes(adapter, base, device, progress)
    family = architecture(base.attention())
    tensors = {
        f"{kohya(name, family)}.diff": change.to(dtype).cpu().reshape(base.stored_shape(name))
        for name, change in changes
    }
    about: dict[str, Any] = {"kind": "difference"} | changes.about()
    _write(Path(path), tensors, adapter, about, {})
    return about


def save_lora(
    adapter: Adapter, base: Weights, path: str | os.PathLike, rank: int, dtype: torch.dtype = torch.float16,
    device: str = "cpu", progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the LoRA of this rank that is nearest to the adapter. Returns what the file's metadata say of it, with
    `energy_kept`, the share of ||dW||^2 over all layers, and `energy_kept_by_layer`.

    Raises SodaFileError as `save_difference`, and for a rank below 1.
    """
    if rank < 1:
        raise SodaFileError(f"{path}: a LoRA of rank {rank} is asked for; give 1 or more")
    changes = Changes(adapter, base, device, progress)
    family = architecture(base.attention())
    tensors: dict[str, Tensor] = {}
    shares: dict[str, float] = {}
    kept = whole = 0.0
    for name, change in changes:
        up, down, share, energy = low_rank(change, rank)
        key = kohya(name, family)
        tensors[f"{key}.lora_up.weight"] = up.to(dtype).cpu().contiguous()
        tensors[f"{key}.lora_down.weight"] = down.to(dtype).cpu().contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(len(down)), dtype=dtype)
        shares[name] = round(share, 4)
        kept, whole = kept + share * energy, whole + energy
    about = {"kind": "lora", "rank": rank, "energy_kept": round(kept / whole if whole else 1.0, 4)} | changes.about()
    about["energy_kept_by_layer"] = shares
    network = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    _write(Path(path), tensors, adapter, about, network)
    return about


def low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """(up `(out, r)`, down `(r, in)`, kept share, ||dW||^2): the nearest matrix of rank r = min(rank, out, in) to
    dW, from the fp64 eigenvectors of the smaller Gram matrix, with its singular values shared between both."""
    dw = change.double()
    wide = dw.shape[0] <= dw.shape[1]
    values, vectors = torch.linalg.eigh(dw @ dw.mT if wide else dw.mT @ dw)
    values, vectors = values.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank]
    energy = float(dw.square().sum())
    half = values.sqrt().sqrt()
    inverse = torch.where(values > 1e-15 * values[0], 1 / half, 0.0)  # below, eigenvalues are rounding
    if wide:
        up, down = vectors * half, inverse[:, None] * (vectors.mT @ dw)
    else:
        up, down = (dw @ vectors) * inverse, half[:, None] * vectors.mT
    return up.float(), down.float(), float(values.sum()) / energy if energy else 1.0, energy


class Changes:
    """dW fp32 `(out, in)` by the path of each adapted weight; the rows of a fused weight come together as one."""

    def __init__(self, adapter: Adapter, base: Weights, device: str, progress: Progress | None = None):
        self.adapter, self.base, self.device, self.progress = adapter, base, device, progress
        self._sketches: list[tuple[Tensor, Tensor]] = []

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        fused: dict[str, list[str]] = {}
        for name in self.adapter.layers:
            fused.setdefault(split_rows(name)[0], []).append(name)
        for done, (path, names) in enumerate(fused.items(), 1):
            change = torch.zeros(self.base.shape(path), device=self.device)
            for name in names:
                first, last = split_rows(name)[1] or (0, len(change))
                change[first:last] += self._change(name)
            yield path, change
            if self.progress is not None:
                self.progress(done, len(fused))

    def _change(self, name: str) -> Tensor:
        terms, shape = self.adapter.layers[name], self.base.shape(name)
        reason = misfit(terms, shape)
        if reason:
            raise SodaFileError(
                f"{self.base.path}: layer {name!r} of {self.adapter.name!r} does not fit: {reason}; give the base of "
                "the adapter's model"
            )
        weight = self.base[name].to(self.device, torch.float32)
        bases: dict[Decomposition, Basis] = {}
        for term in terms:
            basis = bases.get(term.decomposition) or decompose(weight, term.decomposition)
            if basis is None or term.delta is None:
                continue
            bases[term.decomposition] = basis
            if term.sketch is not None:
                self._sketches.append((spectral_sketch(basis, term.delta), term.sketch))
        return adapt(weight, terms, bases) - weight

    def about(self) -> dict[str, Any]:
        """Where the changes come from, after the walk. Raises SodaFileError if the base turned out to be another."""
        error = relative_error(self._sketches)
        if error is not None and error > REFUSED_ERROR:
            trained_on = self.adapter.metadata.get("soda.base_model") or "another base"
            raise SodaFileError(
                f"{self.base.path}: {self.adapter.name!r} was trained on other weights ({trained_on}); its spectrum "
                f"would be off by about {error:.0%} here. Give the base that it was trained on"
            )
        about: dict[str, Any] = {"adapter": self.adapter.name, "base": self.base.path.name}
        return about if error is None else about | {"spectrum_error": float(f"{error:.2g}")}


def _write(
    path: Path, tensors: Mapping[str, Tensor], adapter: Adapter, about: Mapping[str, object], network: Mapping[str, str]
) -> None:
    own = ("soda.format_version", "ss_network_module", "modelspec.hash_sha256", "sshs_model_hash")
    metadata = {key: value for key, value in adapter.metadata.items() if key not in own}
    if "modelspec.architecture" in metadata:
        metadata["modelspec.architecture"] = metadata["modelspec.architecture"].replace("/soda", "/lora")
    metadata |= {"format": "pt", "soda.export": json.dumps(about), **network}
    replace_file(path, lambda file: save_file(dict(tensors), file, metadata))
