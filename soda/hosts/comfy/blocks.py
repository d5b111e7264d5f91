"""The repeated blocks of a network: what is computed again in the backward pass when memory is short.

A block is the innermost numbered module (an element of a list) around an adapted weight, with its siblings in that
list; elsewhere the outermost numbered module with more than one weight, such as a ResBlock. No block lies in another.
A block whose network calls it by another method than forward keeps its activations; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks(network: nn.Module, weights: Iterable[str]) -> dict[str, nn.Module]:
    """Path -> block of a network, of which `weights` are the paths of adapted weights' modules, in their order."""
    modules = dict(network.named_modules())
    around = {block for path in weights if (block := _around(modules, path)) is not None}
    lists = {block.rpartition(".")[0] for block in around}
    inner = {path for path, module in modules.items() if path.rpartition(".")[0] in lists and _is_block(path, module)}
    inner = {path for path in inner | around if not any(other.startswith(f"{path}.") for other in around)}
    above = {path[:i] for path in inner for i, letter in enumerate(path) if letter == "."}
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if any(path.startswith(f"{block}.") for block in found):
            continue
        if path in inner or (path not in above and _is_block(path, module)):
            found[path] = module
    return found


def _around(modules: dict[str, nn.Module], path: str) -> str | None:
    while path and not _is_block(path, modules[path]):
        path = path.rpartition(".")[0]
    return path or None


def _is_block(path: str, module: nn.Module) -> bool:
    if not path.rpartition(".")[2].isdigit() or isinstance(module, CONTAINERS):
        return False
    return sum(1 for part in module.modules() if part._parameters.get("weight") is not None) > 1
