"""Turns a workflow as the page saves it into a prompt as the server takes it, and changes values in it.

A saved node lists its inputs in order, those with a widget marked as such, and apart from them the widgets' values in
the same order; dynamic inputs are already spelled out there (`row.weight`, `adapters.adapter0`). One widget has no
input: "control after generate", which follows a seed. The page itself does this conversion in app.graphToPrompt();
the browser tests compare the two.
"""

import json
from pathlib import Path

PAGE_ONLY = ("MarkdownNote", "Note")
SEEDS = ("seed", "noise_seed")  # the page gives these the widget unless their definition says otherwise
ALWAYS = 0  # a node's mode; the others (muted, bypassed) do not occur in the shipped workflows


def load_prompt(path: Path, object_info: dict) -> dict[str, dict]:
    """The API-format prompt of a workflow file, with `object_info` as the server gives it."""
    return to_prompt(json.loads(path.read_text(encoding="utf-8")), object_info)


def to_prompt(graph: dict, object_info: dict) -> dict[str, dict]:
    """Graph with nodes and links [id, from node, from slot, to node, to slot, type] -> {node id: class and inputs}."""
    sources = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        if node["type"] in PAGE_ONLY:
            continue
        if node["type"] not in object_info:
            raise ValueError(f"the server has no node {node['type']}, which the workflow uses")
        if node.get("mode", ALWAYS) != ALWAYS:
            raise ValueError(f"node {node['id']} ({node['type']}) is muted or bypassed: not converted")
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": _inputs(node, object_info[node["type"]]["input"], sources),
        }
    return prompt


def _inputs(node: dict, definition: dict, sources: dict[int, list]) -> dict:
    values = list(node.get("widgets_values") or [])
    inputs = {}
    for entry in node.get("inputs", []):
        name = entry["name"]
        if entry.get("widget"):
            inputs[name] = values.pop(0)
            if _options(definition, name).get("control_after_generate", name in SEEDS):
                values.pop(0)
        if entry.get("link") is not None:
            inputs[name] = sources[entry["link"]]
    if values:
        raise ValueError(f"node {node['id']} ({node['type']}) has widget values without an input: {values}")
    return inputs


def _options(definition: dict, name: str) -> dict:
    for group in ("required", "optional"):
        entry = definition.get(group, {}).get(name)
        if entry is not None and len(entry) > 1:
            return entry[1]
    return {}


def node_ids(prompt: dict[str, dict], class_type: str) -> list[str]:
    """The ids of all nodes of a class, in the workflow's order."""
    return [node for node, entry in prompt.items() if entry["class_type"] == class_type]


def set_values(prompt: dict[str, dict], class_type: str, **values: object) -> None:
    """Sets inputs on every node of a class that has them; an input that none has is an error, not a new one."""
    for name, value in values.items():
        holders = [node for node in node_ids(prompt, class_type) if name in prompt[node]["inputs"]]
        if not holders:
            raise KeyError(f"no {class_type} in the workflow has an input {name}")
        for node in holders:
            prompt[node]["inputs"][name] = value
