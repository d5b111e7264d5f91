"""Rotations as Kronecker products of small ones: R = R_1 x ... x R_r in SO(n_1 ... n_r), R_j = exp(A_j), A_j skew.

A skew A is kept as its strict upper triangle, row by row: n (n - 1) / 2 numbers. All functions take leading batch
dimensions and work in the dtype of their input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

OFFICIAL_SIZES = {640: (8, 8, 10), 768: (6, 8, 16), 1280: (4, 16, 20), 2048: (4, 8, 64)}
MAX_FACTORS = 5
# Up to here one product with the dense R is as fast as two with its halves. On a CPU measured with 64 to 1280 rows on
# one core: dense wins 4 times at 64, draws at 192 and loses 2 times at 320. For GPUs a guess on the safe side.
DENSE_DIMENSION_CPU = 160
DENSE_DIMENSION = 256
BATCHED_COLUMNS = 16  # from here on a CPU's batched products of small matrices outrun one product and two copies
BATCHED_ROWS = 128  # up to here those of a GPU do


@lru_cache(maxsize=1024)
def factor_sizes(dimension: int, count: int) -> tuple[int, ...]:
    """`count` sizes, ascending, whose product is `dimension`.

    Three factors of 640, 768, 1280 and 2048 are the official ones; everything else is the factorisation of least sum
    (the most even one, with the fewest numbers), the first in order among equals. A prime gives (1, ..., 1, prime).
    Raises ValueError for a dimension below 1, or a count that is not 1 to 5.
    """
    if dimension < 1:
        raise ValueError(f"a dimension of {dimension} has no factor sizes; give 1 or more")
    if not 1 <= count <= MAX_FACTORS:
        raise ValueError(f"{count} factors asked for; 1 to {MAX_FACTORS} are possible")
    if count == 3 and dimension in OFFICIAL_SIZES:
        return OFFICIAL_SIZES[dimension]

    def splits(rest: int, parts: int, least: int) -> list[tuple[int, ...]]:
        if parts == 1:
            return [(rest,)] if rest >= least else []
        found = []
        divisor = least
        while divisor**parts <= rest:
            if rest % divisor == 0:
                found += [(divisor, *tail) for tail in splits(rest // divisor, parts - 1, divisor)]
            divisor += 1
        return found

    return min(splits(dimension, count, 1), key=lambda sizes: (sum(sizes), sizes))


def skew(triangle: Tensor, n: int) -> Tensor:
    """A `(..., n, n)` with A = -A^T from its strict upper triangle `(..., n (n - 1) / 2)`."""
    rows, columns = torch.triu_indices(n, n, 1, device=triangle.device)
    flat = triangle.new_zeros(*triangle.shape[:-1], n * n)
    upper = flat.index_copy(-1, rows * n + columns, triangle).unflatten(-1, (n, n))
    return upper - upper.mT


def triangle(a: Tensor) -> Tensor:
    """The strict upper triangle `(..., n (n - 1) / 2)` of a skew `(..., n, n)`."""
    rows, columns = torch.triu_indices(a.shape[-1], a.shape[-1], 1, device=a.device)
    return a[..., rows, columns]


def expm_factors(logs: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """R_j = exp(A_j), `(..., n_j, n_j)`, from the triangles of A_j."""
    return [expm(skew(log, n)) for log, n in zip(logs, sizes, strict=True)]


def expm(a: Tensor) -> Tensor:
    """exp(A) `(..., n, n)`, to the last bit the same in any batch: torch takes fewer terms for a matrix alone (good to
    2e-10 in fp64)."""
    alone = a.numel() == a.shape[-1] ** 2
    return torch.linalg.matrix_exp(torch.stack([a, a]))[0] if alone else torch.linalg.matrix_exp(a)


def kronecker(factors: Sequence[Tensor]) -> Tensor:
    """The dense R_1 x ... x R_r, `(..., N, N)`."""
    product = factors[0]
    for factor in factors[1:]:
        product = torch.einsum("...ab,...cd->...acbd", product, factor).flatten(-2).flatten(-3, -2)
    return product


def kronecker_sum(logs: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The dense logarithm of R, `(N, N)`: A_1 x I x ... + I x A_2 x ... + ..., from the triangles of A_j."""
    terms, left = [], 1
    for log, n in zip(logs, sizes, strict=True):
        right = math.prod(sizes) // (left * n)
        eyes = [torch.eye(size, dtype=log.dtype, device=log.device) for size in (left, right)]
        terms.append(kronecker([eyes[0], skew(log, n), eyes[1]]))
        left *= n
    return sum(terms[1:], terms[0])


def halves(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same R with neighbouring factors multiplied out to two, sizes a + b least; one factor stays as it is."""
    sizes = [factor.shape[-1] for factor in factors]
    if len(sizes) < 2:
        return list(factors)
    split = min(range(1, len(sizes)), key=lambda i: math.prod(sizes[:i]) + math.prod(sizes[i:]))
    return [kronecker(factors[:split]), kronecker(factors[split:])]


def compact(factors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same R as `rotate` uses it on a device: the two `halves`, or for a small N the dense R alone."""
    parts = halves(factors)
    dimension = math.prod(part.shape[-1] for part in parts)
    small = dimension <= (DENSE_DIMENSION_CPU if device.type == "cpu" else DENSE_DIMENSION)
    return [kronecker(parts)] if small or sum(part.shape[-1] for part in parts) > dimension else parts


def rotate(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """x R^T, in x's dtype, for x `(..., m, N)` and factors `(..., n_j, n_j)` of the same leading dimensions."""
    return rotate_compact(x, [part.to(x.dtype) for part in compact(factors, x.device)])


def rotate_compact(x: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """x R^T for the `compact` form of R on x's device, in x's dtype.

    As R = A x B of `halves`: a row as a matrix X (a, b) turns to A X B^T, a + b products per number instead of N. More
    passes would save products and cost more in copies. Small N goes through the dense R.
    """
    if len(parts) == 1:
        return x @ parts[0].mT
    first, second = parts
    a, b = first.shape[-1], second.shape[-1]
    if x.dim() == 2 and (b >= BATCHED_COLUMNS if x.device.type == "cpu" else a <= BATCHED_ROWS):
        turned = torch.mm(x.reshape(-1, b), second.mT).view(-1, a, b)
        return torch.bmm(first.expand(len(x), a, a), turned).view(x.shape)  # without moving a number
    turned = (x.reshape(*x.shape[:-2], -1, b) @ second.mT).reshape(*x.shape[:-1], a, b)
    turned = turned.mT.reshape(*x.shape[:-2], -1, a) @ first.mT
    return turned.reshape(*x.shape[:-1], b, a).mT.reshape(x.shape)


def widest_angle(r: Tensor) -> Tensor:
    """The largest angle `(...)`, from 0 to pi, of each orthogonal R `(..., n, n)`, fp64.

    The symmetric part of R has the eigenvalues cos theta; near 0 the angle is good to 1e-8 only.
    """
    return torch.linalg.eigvalsh((r + r.mT) / 2)[..., 0].clamp(-1, 1).acos()


def log_rotation(r: Tensor) -> Tensor:
    """The skew A `(..., n, n)` with exp(A) = R and angles in [-pi, pi], for R in SO(n).

    With the Cayley transform K = (R - I)(R + I)^-1, -iK is Hermitian and its eigenvalues tan(theta / 2) are distinct
    wherever the angles are, so repeated angles do no harm. Matrices with an angle close to pi, where K does not
    exist, take a phase-shifted transform of their own. Computed in fp64, returned in R's dtype.
    Raises ValueError if a matrix is a reflection (determinant -1).
    """
    n = r.shape[-1]
    matrices = r.detach().to("cpu", torch.float64).reshape(-1, n, n)
    near_pi = widest_angle(matrices) > 3.0
    if (torch.linalg.det(matrices[near_pi]) < 0).any():  # a reflection has the eigenvalue -1
        raise ValueError("a matrix of determinant -1 is a reflection and has no real logarithm")
    result = torch.empty_like(matrices)
    plain = matrices[~near_pi]
    if len(plain):
        eye = torch.eye(n, dtype=torch.float64)
        cayley = torch.linalg.solve(plain + eye, plain - eye)
        values, vectors = torch.linalg.eigh(-1j * (cayley - cayley.mT) / 2)
        result[~near_pi] = ((vectors * (2j * values.atan())[:, None, :]) @ vectors.mH).real
    for index in near_pi.nonzero().flatten().tolist():
        result[index] = _log_near_pi(matrices[index])
    result = (result - result.mT) / 2
    return result.reshape(r.shape).to(r)


def _log_near_pi(r: Tensor) -> Tensor:
    """The logarithm of one rotation `(n, n)` fp64, whatever its angles.

    H = i (I - e^{-i phi} R)(I + e^{-i phi} R)^-1 is Hermitian with eigenvalues tan((theta - phi) / 2); phi + pi lies
    in the widest gap between the angles. The eigenspace of -1 has even dimension: its vectors are paired into planes.
    """
    n = len(r)
    ordered = torch.linalg.eigvals(r).angle().sort().values
    gaps = torch.cat([ordered[1:], ordered[:1] + 2 * math.pi]) - ordered
    widest = int(gaps.argmax())
    phi = float(ordered[widest] + gaps[widest] / 2) - math.pi
    turned = r * torch.exp(torch.tensor(-1j * phi, dtype=torch.complex128))
    eye = torch.eye(n, dtype=torch.complex128)
    hermitian = 1j * torch.linalg.solve(eye + turned, eye - turned)
    _, vectors = torch.linalg.eigh((hermitian + hermitian.mH) / 2)
    theta = torch.einsum("ji,jk,ki->i", vectors.conj(), r.to(torch.complex128), vectors).angle()
    half_turn = theta.abs() > math.pi - 1e-7
    rest = vectors[:, ~half_turn]
    result = ((rest * (1j * theta[~half_turn])) @ rest.mH).real
    if half_turn.any():
        projector = (vectors[:, half_turn] @ vectors[:, half_turn].mH).real
        plane = torch.linalg.eigh(projector)[1][:, -int(half_turn.sum()) :]
        for u, v in zip(plane[:, 0::2].mT, plane[:, 1::2].mT, strict=True):
            result = result + math.pi * (torch.outer(v, u) - torch.outer(u, v))
    return result
