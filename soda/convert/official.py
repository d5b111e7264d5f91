"""The tables of the authors' training script (github.com/phymhan/SODA-Diffusion) -> format 1.

The script saves {"unet": [...], "text_encoder_one": [...], "text_encoder_two": [...]} with torch.save: flat lists
of Q_1, Q_2, Q_3, delta of one projection after the other, in the order in which diffusers registers the modules,
each a tensor or a list of one tensor. No name and no size is stored, hence the base. With W0 the base weight,

    svd   W = U max(S + delta, 0) V^T (Q_1 x Q_2 x Q_3)^T          W0 = U S V^T
    lq    W^T = (Q_1 x Q_2 x Q_3) Q (T + diag delta)               W0^T = Q T, LAPACK's signs

The factors become exact rotations (their polar factors) and then logarithms; delta is held at -S or above, or takes
the signs that make diag(T) positive. Pickle is only ever read with `weights_only`.
"""

from __future__ import annotations

import math
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..adapter import Adapter, Layer
from ..decomposition import decompose, spectral_sketch
from ..errors import SodaFileError, unreadable
from ..fingerprint import joint_hash, tensor_hash
from ..kronecker import log_rotation, triangle
from ..metadata import describe
from .base import CLIP_G, BaseWeights, Progress
from .names import architecture, diffusers_order

CLIP_L = "clip_l.transformer.text_model.encoder.layers.{}.self_attn.{}_proj"
ENCODERS = {"text_encoder_one": CLIP_L, "text_encoder_two": CLIP_G}
PARTS = ("factor 1", "factor 2", "factor 3", "delta")
LARGEST_DEVIATION = 0.5  # of Q^T Q from I: bf16 training drifts to 0.02, factors scaled or summed are far above


def read_official(
    path: str | os.PathLike, base: BaseWeights, decomposition: Literal["svd", "lq"] = "svd", device: str = "cpu",
    progress: Progress | None = None,
) -> Adapter:  # fmt: skip
    """The adapter in an official `.pt` file, trained on `base`. `decomposition` is not in the file: `svd` is what
    the published script trains, `lq` its earlier variant. `device` computes the bases, and
    `progress` is called with the number of projections done and of all in their table.

    Raises SodaFileError if the file holds anything but such tables, or if they do not fit the base; the message
    names the table, the position in it and what is expected there.
    """
    path = Path(path)
    layers: dict[str, tuple[Layer, ...]] = {}
    hashes: dict[str, str] = {}
    for table, tensors in _tables(path).items():
        names = _layer_names(table, base)
        if len(tensors) != 4 * len(names):
            raise SodaFileError(
                f"{path}: table {table!r} has {len(tensors)} tensors, expected {4 * len(names)}, that is {PARTS} for "
                f"each of {len(names)} projections of {base.path.name}; give the base that it was trained on"
            )
        for i, name in enumerate(names):
            shape = base.shape(name)
            for j, part in enumerate(PARTS):
                reason = _fault(tensors[4 * i + j], part, shape)
                if reason:
                    raise SodaFileError(
                        f"{path}: {table}[{4 * i + j}], {part} of {name}, {reason}; give the base it was trained on"
                    )
            *factors, delta = tensors[4 * i : 4 * i + 4]
            weight = base[name]
            hashes[name] = tensor_hash(weight)
            try:
                layers[name] = (_layer(weight.to(device), factors, delta.double(), decomposition),)
            except ValueError as error:
                raise SodaFileError(f"{path}: {table}[{4 * i}], factors of {name}: {error}; train it again") from None
            if progress is not None:
                progress(i + 1, len(names))
    family = architecture(base.attention())
    metadata = describe(
        title=path.stem, role="other", architecture=f"{family or 'unknown'}/soda", base_model=base.path.stem,
        base_hash=joint_hash(hashes), training={"converted_from": path.name},
    )  # fmt: skip
    return Adapter(layers, metadata, path.stem)


def _tables(path: Path) -> dict[str, list[Tensor]]:
    """The non-empty lists of the file by name, every entry a tensor."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on pickles of other making: what is in them is checked below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except EOFError:
        raise SodaFileError(f"{path}: this .pt file is empty or ends early; download it again") from None
    except OSError as error:
        raise unreadable(path, error, "an official .pt file") from None
    except pickle.UnpicklingError:
        raise SodaFileError(
            f"{path}: the file holds more than tensors, which may run code, so it is not opened; ask for one with "
            "tensors alone"
        ) from None
    except Exception as error:  # torch has no common error for broken files
        raise SodaFileError(f"{path}: this is no readable .pt file ({error}); download it again") from error
    known = ("unet", *ENCODERS)
    if not isinstance(content, Mapping) or not set(content) <= set(known):
        found = ", ".join(map(repr, content)) if isinstance(content, Mapping) else type(content).__name__
        raise SodaFileError(
            f"{path}: the file holds {found[:200]}, expected tables named {', '.join(known)}; choose an official "
            "training's .pt file"
        )
    tables: dict[str, list[Tensor]] = {}
    for name, entries in content.items():
        if not isinstance(entries, (list, tuple)):
            raise SodaFileError(
                f"{path}: table {name!r} is a {type(entries).__name__}, expected a list of tensors; choose an official "
                "training's .pt file"
            )
        for position, entry in enumerate(entries):
            tensor = entry[0] if isinstance(entry, (list, tuple)) and len(entry) == 1 else entry
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
                raise SodaFileError(
                    f"{path}: {name}[{position}] is a {type(tensor).__name__}, expected a tensor of real numbers; "
                    "a file with anything else in it is not converted"
                )
            tables.setdefault(name, []).append(tensor.detach())
    if not tables:
        raise SodaFileError(f"{path}: the tables are empty; choose a file that holds an adapter")
    return tables


def _layer_names(table: str, base: BaseWeights) -> list[str]:
    """The projections that a table lists, in its order."""
    if table == "unet":
        return diffusers_order(base.attention())
    names: list[str] = []
    while all((name := ENCODERS[table].format(len(names) // 4, part)) in base for part in ("k", "v", "q", "out")):
        names += [ENCODERS[table].format(len(names) // 4, part) for part in ("k", "v", "q", "out")]
    if not names:
        raise SodaFileError(
            f"{base.path}: the base lacks {name!r}, and the file trains {table}; give a full checkpoint"
        )
    return names


def _fault(tensor: Tensor, part: str, shape: tuple[int, int]) -> str:
    """What is wrong with one tensor of a projection of this shape, before anything is computed with it; or ""."""
    size = tuple(tensor.shape)
    if part == "delta":
        if size != (min(shape),):
            return f"has shape {size}, expected ({min(shape)},) for a weight {shape}"
    elif len(size) != 2 or size[0] != size[1] or not size[0] or shape[1] % size[0]:
        return f"has shape {size}, expected (n, n) with n a divisor of the weight's {shape[1]} inputs"
    return "" if tensor.isfinite().all() else "holds NaN or infinite numbers"


def _layer(weight: Tensor, factors: Sequence[Tensor], delta: Tensor, decomposition: Literal["svd", "lq"]) -> Layer:
    """One projection's layer; ValueError if its factors are no rotations of the weight's inputs."""
    sizes = tuple(len(factor) for factor in factors)
    if math.prod(sizes) != weight.shape[1]:
        raise ValueError(f"sizes {sizes} multiply to {math.prod(sizes)}, expected the {weight.shape[1]} inputs")
    logs = tuple(triangle(log_rotation(_polar(factor.double()))).float() for factor in factors)
    basis = decompose(weight, decomposition)
    assert basis is not None
    spectrum, live = basis.spectrum.cpu(), basis.live.cpu()
    if decomposition == "svd":
        delta = torch.maximum(delta, -spectrum.double())
    else:
        diagonal = torch.linalg.qr(weight.cpu().float().mT).R.diagonal()
        delta = torch.where(diagonal < 0, -delta, delta)
    kept = torch.where(live, delta, 0.0).float()
    return Layer(decomposition, kept, logs, spectral_sketch(basis, kept))


def _polar(factor: Tensor) -> Tensor:
    """The rotation nearest to an almost orthogonal matrix."""
    u, s, vt = torch.linalg.svd(factor)
    if (s.square() - 1).abs().max() > LARGEST_DEVIATION:
        raise ValueError(f"singular values from {s[-1]:.3g} to {s[0]:.3g} belong to no rotation")
    return u @ vt
