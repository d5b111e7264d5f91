"""Where a network's attention projections are, by the names and shapes of its state dict alone.

An attention is a module with children for queries, keys and values, whatever they are called and however they are
fused; the child that gathers the heads belongs to it. Fused rows are layers of their own, each with a rotation and a
spectrum of its own:

    to_q, wk, add_v_proj, w2q, k_img, query     one matrix each
    qkv (3w, in), kv (2w, in)                   [0:w], [w:2w], [2w:3w]
    qkv (w + 2g, in) of grouped queries         [0:w], [w:w+g], [w+g:w+2g], w being what the output takes
    qkv (5w, in), kv (3w, in)                   q k v q' k' and k k' v of differential attention
    linear1 (3w + mlp, in)                      the first three of a single-stream block; the rest is its MLP's

A 1 x 1 convolution (out, in, 1, 1) is the matrix (out, in).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .base import matrix_shape

# The words of a projection's name: one says its role, the others are how authors decorate it.
ROLES = {"q": "q", "k": "k", "v": "v", "query": "q", "key": "k", "value": "v", "kv": "kv", "qkv": "qkv"}
OUTPUTS = {"out", "o", "output", "proj", "linear2"}
DECORATION = {
    "to", "add", "proj", "linear", "linear1", "layer",  # what it does
    "attn", "img", "txt", "instruct", "x", "y", "t",  # of which stream
}  # fmt: skip
STREAMS = {"vid", "txt", "all"}  # modules below a projection, one per stream


class _Projection(NamedTuple):
    path: str
    role: str  # a role of ROLES, or "o"
    shape: tuple[int, int]


def projections(shapes: Mapping[str, Sequence[int]], below: str = "diffusion_model.") -> dict[str, str]:
    """Layer name -> state dict key of every attention projection whose key begins with `below`, in the order of
    `shapes` (state dict key -> shape)."""
    attentions: dict[str, list[_Projection]] = {}
    for key, shape in shapes.items():
        if key.startswith(below) and key.endswith(".weight"):
            path, matrix = key.removesuffix(".weight"), matrix_shape(shape)
            module, role = _role(path)
            if role is not None and len(matrix) == 2:
                attentions.setdefault(module, []).append(_Projection(path, role, matrix))
    rows = {}
    for found in attentions.values():
        if {role for one in found for role in one.role} >= {"q", "k", "v"}:
            rows.update(_rows(found))
    for key, shape in shapes.items():
        if key.endswith(".linear1.weight") and f"{_parent(key)}.norm.query_norm.weight" in shapes:
            width = shape[1]
            rows[key.removesuffix(".weight")] = [(i * width, (i + 1) * width) for i in range(3)]
    layers = {}
    for key in shapes:
        path = key.removesuffix(".weight")
        for piece in rows.get(path, ()) if key.endswith(".weight") else ():
            layers[path if piece is None else f"{path}[{piece[0]}:{piece[1]}]"] = key
    return layers


def _parent(key: str) -> str:
    return key.rsplit(".", 2)[0]


def _role(path: str) -> tuple[str, str | None]:
    """(the attention's module, the role of this child of it or None)."""
    *module, leaf = path.split(".")
    while (leaf.isdigit() or leaf in STREAMS) and module:  # to_out.0, proj_qkv.vid
        leaf = module.pop()
    if module and module[-1] == "processor":
        module.pop()
    # Wqkv, w1q: weights of a role, in old papers' letters
    words = [re.sub(r"^w[12]?(?=[qkvo])", "", word) for word in leaf.lower().split("_")]
    roles = [ROLES[word] for word in words if word in ROLES]
    rest = [word for word in words if word not in ROLES]
    if len(roles) == 1 and DECORATION.issuperset(rest):
        return ".".join(module), roles[0]
    if not roles and OUTPUTS.intersection(rest) and (OUTPUTS | DECORATION).issuperset(rest):
        return ".".join(module), "o"
    return ".".join(module), None


def _rows(found: Sequence[_Projection]) -> dict[str, list[tuple[int, int] | None]]:
    """Path -> the rows of each layer in it, None for all, of the projections of one attention."""
    width = next((one.shape[1] for one in found if one.role == "o"), None)
    differential = width is not None and any(one.role == "q" and one.shape[0] == 2 * width for one in found)
    pieces: dict[str, list[tuple[int, int] | None]] = {}
    for one in found:
        total = one.shape[0]
        if one.role == "kv":
            sizes = [total // 3] * 3 if differential else [total // 2] * 2
        elif one.role != "qkv":
            pieces[one.path] = [None]
            continue
        elif width is not None and total == 5 * width:
            sizes = [width] * 5
        elif width is not None and width < total < 3 * width:
            sizes = [width, (total - width) // 2, (total - width) // 2]
        else:
            sizes = [total // 3] * 3
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        pieces[one.path] = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return pieces
