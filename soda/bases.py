"""The bases of many weights: batches of equal shape within a working set, on the faster of device and CPU.

What comes out of a batch is copied into memory of its own, so that nothing holds the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from .adapter import Decomposition
from .decomposition import VECTORS, Basis, decompose
from .precision import CPU, is_fast_in_fp64, solver_device

WORKING_SET = 3 << 28  # bytes, some seven 1280 x 1280 at a time; larger batches are no faster
Progress = Callable[[int, int], None]


class Some(Mapping[str, Tensor]):
    """Some weights of a mapping that may load each anew at every look."""

    def __init__(self, weights: Mapping[str, Tensor], names: Iterable[str]):
        self._weights, self._names = weights, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def decompose_all(
    weights: Mapping[str, Tensor],
    decomposition: Decomposition,
    *,
    device: torch.device = CPU,
    working_set: int = WORKING_SET,
    progress: Progress | None = None,
    keep: bool = False,
) -> Iterator[tuple[str, Basis]]:
    """(name, basis) of every weight, fp32 on the CPU (with `keep` where it was made), shape after shape; nothing for
    `none`.

    `device` is where the model computes; what is decomposed there takes at most `working_set` bytes at a time, or what
    one matrix takes. `weights` may load a weight anew at every look. `progress(done, total)` is told after every
    matrix. Raises ValueError as `decompose` does.
    """
    done = 0
    for batch in decompose_batches(weights, decomposition, device=device, working_set=working_set):
        for name, basis in batch.items():
            done += 1
            if progress is not None:
                progress(done, len(weights))
            yield name, _copied(basis, basis.spectrum.device if keep else CPU)


def to_keep(basis: Basis) -> Basis:
    """The kept form of a basis, in main memory."""
    return _copied(basis.kept(), CPU)


def decompose_batches(
    weights: Mapping[str, Tensor], decomposition: Decomposition, *, device: torch.device, working_set: int
) -> Iterator[dict[str, Basis]]:
    """`decompose_all` by what is decomposed together, where it was made, as parts of it."""
    if decomposition == "none":
        return
    device = solver_device(device, decomposition)
    by_shape: dict[torch.Size, list[str]] = {}
    for name, weight in weights.items():
        by_shape.setdefault(weight.shape, []).append(name)
    for shape, names in by_shape.items():
        count = max(1, working_set // working_bytes(shape, decomposition, device))
        for start in range(0, len(names), count):
            chunk = names[start : start + count]
            yield dict(zip(chunk, _batch([weights[n] for n in chunk], decomposition, device), strict=True))


def working_bytes(shape: torch.Size, decomposition: Decomposition, device: torch.device) -> int:
    """Bytes that the decomposition of one weight `(out, in)` takes at its height, its basis included; an upper bound.

    svd: W in fp32 and fp64, then, all fp64, the Gram matrix, its vectors and LAPACK's two squares beside them, or the
    vectors twice and the other side as well. lq and qr: W, its copies in and out of the solver and Q, fp32 or fp64, and
    on a GPU three squares; then Q once more in fp32.
    """
    out, inner = shape
    small, numbers = min(shape), out * inner
    if decomposition == "svd":
        return max(16 * numbers + 48 * small * small, 28 * numbers + 16 * small * small)
    width = 8 if device.type != "cpu" and is_fast_in_fp64(device) else 4
    return width * (4 * numbers + 4 * small * small) + 4 * numbers


@torch.inference_mode(False)
@torch.no_grad()
def _batch(weights: list[Tensor], decomposition: Decomposition, device: torch.device) -> list[Basis]:
    dtype = torch.float64 if all(w.dtype == torch.float64 for w in weights) else torch.float32
    together = decompose(torch.stack([w.to(device, dtype) for w in weights]), decomposition)
    assert together is not None
    parts = together.tensors()
    return [Basis.of(decomposition, {name: parts[name][i] for name in parts}) for i in range(len(weights))]


@torch.inference_mode(False)
@torch.no_grad()
def _copied(basis: Basis, place: torch.device) -> Basis:
    """On a device, in memory of its own, its vectors one after the other."""
    tensors = basis.tensors()
    vectors = [name for name in VECTORS if name in tensors]
    dtype, sizes = tensors[vectors[0]].dtype, [tensors[name].numel() for name in vectors]
    parts = torch.empty(sum(sizes), dtype=dtype, device=place).split(sizes)
    copies = {name: part.view_as(tensors[name]) for name, part in zip(vectors, parts, strict=True)}
    for name, tensor in tensors.items():
        copy = copies[name] if name in copies else torch.empty_like(tensor, device=place)
        if tensor.device != place == CPU:
            copy.zero_()  # by all threads: the copy alone meets new pages in one, several times slower
        copies[name] = copy.copy_(tensor)
    return Basis.of(basis.decomposition, copies)
