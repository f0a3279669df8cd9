"""Whether a schema has a value that ends: a required property that contains itself has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from powerband.structured.json_schema import children

Path = tuple[str, ...]


def endless_place(schema: Any) -> Path | None:
    """Where the schema asks for values without end, and for nothing else; None where an answer can end.

    Other contradictions are found when it is compiled. Takes time in proportion to the schema's size.
    """
    nodes = _nodes(schema)
    needs = {path: _needs(path, node, nodes) for path, node in nodes.items()}
    users: dict[Path, list[tuple[Path, int]]] = {}  # by path: which nodes need it, and in which of their needs
    for path, alternatives in needs.items():
        for index, paths in enumerate(alternatives):
            for used in paths:
                users.setdefault(used, []).append((path, index))
    open_needs = {path: set(range(len(alternatives))) for path, alternatives in needs.items()}
    finite = [path for path, left in open_needs.items() if not left]
    for path in finite:  # which grows
        for user, index in users.get(path, ()):
            left = open_needs[user]
            if index in left:
                left.remove(index)
                if not left:
                    finite.append(user)
    if not open_needs[()]:
        return None
    return min((path for path, left in open_needs.items() if left and path), key=len, default=())


def _nodes(schema: Any) -> dict[Path, Any]:
    nodes: list[tuple[Path, Any]] = [((), schema)]
    for path, node in nodes:  # which grows
        nodes += [((*path, *place), child) for place, child in children(node)]
    return dict(nodes)


def _needs(path: Path, node: Any, nodes: Mapping[Path, Any]) -> list[list[Path]]:
    """What has to be finite for `node` to be: of each list one."""
    if not isinstance(node, dict) or "const" in node or "enum" in node:
        return []
    needs: list[list[Path]] = []
    reference = node.get("$ref")
    if isinstance(reference, str) and (target := _target(reference)) in nodes:
        needs.append([target])
    needs += [
        [(*path, name, str(index)) for index in range(len(node[name]))] for name in ("anyOf", "oneOf") if name in node
    ]
    needs += [[(*path, "allOf", str(index))] for index in range(len(node.get("allOf", ())))]
    kinds = node.get("type")
    if kinds == "object":
        required = set(node.get("required", ()))
        needs += [[(*path, "properties", name)] for name in node.get("properties", {}) if name in required]
    if kinds == "array":
        num_items = node.get("minItems", 0)
        prefix = node.get("prefixItems", [])
        needs += [[(*path, "prefixItems", str(index))] for index in range(min(num_items, len(prefix)))]
        if num_items > len(prefix) and "items" in node:
            needs.append([(*path, "items")])
    return needs


def _target(reference: str) -> Path:
    """The place that a pointer names (RFC 6901)."""
    pointer = reference.removeprefix("#").strip("/")
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")) if pointer else ()
