"""Whether a schema has a value that ends: a required property that contains itself has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from powerband.structured.json_schema import children

Path = tuple[str, ...]


def endless_place(schema: Any) -> Path | None:
    """Where the schema asks for values without end, and for nothing else; None where an answer can end.

    Other contradictions are found when it is compiled.
    """
    nodes = _nodes(schema)
    by_path = dict(nodes)
    finite: set[Path] = set()
    grew = True
    while grew:
        grew = False
        for path, node in reversed(nodes):  # parts first
            if path not in finite and _is_finite(path, node, finite, by_path):
                finite.add(path)
                grew = True
    if () in finite:
        return None
    return min((path for path in by_path if path not in finite and path), key=len, default=())


def _nodes(schema: Any) -> list[tuple[Path, Any]]:
    nodes: list[tuple[Path, Any]] = [((), schema)]
    for path, node in nodes:
        nodes += [((*path, *place), child) for place, child in children(node)]
    return nodes


def _is_finite(path: Path, node: Any, finite: set[Path], by_path: Mapping[Path, Any]) -> bool:
    """Whether `node` has a value of parts that are known to be finite."""
    if not isinstance(node, dict):
        return True
    if "const" in node or "enum" in node:
        return True
    reference = node.get("$ref")
    if isinstance(reference, str):
        target = _target(reference)
        if target in by_path and target not in finite:
            return False
    for name in ("anyOf", "oneOf"):
        if name in node and not any((*path, name, str(index)) in finite for index in range(len(node[name]))):
            return False
    if any((*path, "allOf", str(index)) not in finite for index in range(len(node.get("allOf", ())))):
        return False
    kinds = node.get("type")
    if kinds == "object":
        required = set(node.get("required", ()))
        return all((*path, "properties", name) in finite for name in node.get("properties", {}) if name in required)
    if kinds == "array":
        needed = node.get("minItems", 0)
        prefix = node.get("prefixItems", [])
        firsts = all((*path, "prefixItems", str(index)) in finite for index in range(min(needed, len(prefix))))
        return firsts and (needed <= len(prefix) or "items" not in node or (*path, "items") in finite)
    return True


def _target(reference: str) -> Path:
    """The place that a pointer names (RFC 6901)."""
    pointer = reference.removeprefix("#").strip("/")
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")) if pointer else ()
