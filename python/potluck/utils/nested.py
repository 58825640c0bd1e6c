"""Flattening of nested lists, tuples and dicts in an order that all peers agree on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any


def nested_compare(t: Any, u: Any) -> bool:
    """Whether two structures are nested alike."""
    if isinstance(t, (list, tuple)):
        same = isinstance(u, (list, tuple)) and len(t) == len(u)
        return same and all(nested_compare(a, b) for a, b in zip(t, u, strict=True))
    if isinstance(t, dict):
        return isinstance(u, dict) and t.keys() == u.keys() and all(nested_compare(t[k], u[k]) for k in t)
    return not isinstance(u, (list, tuple, dict))


def _sorted_keys(t: dict[Any, Any]) -> list[Any]:
    # Numbers and text in one dict cannot be compared with one another: sort by type first.
    return sorted(t, key=lambda key: (type(key).__name__, key))


def nested_flatten(t: Any) -> Iterator[Any]:
    """The leaves in order."""
    if isinstance(t, (list, tuple)):
        for item in t:
            yield from nested_flatten(item)
    elif isinstance(t, dict):
        for key in _sorted_keys(t):
            yield from nested_flatten(t[key])
    else:
        yield t


def nested_pack(flat: Iterable[Any], structure: Any) -> Any:
    """Put leaves back into a structure."""
    return _pack(iter(flat), structure)


def _pack(flat: Iterator[Any], structure: Any) -> Any:
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(_pack(flat, item) for item in structure))
    if isinstance(structure, (list, tuple)):
        return type(structure)(_pack(flat, item) for item in structure)
    if isinstance(structure, dict):
        packed = {key: _pack(flat, structure[key]) for key in _sorted_keys(structure)}
        return {key: packed[key] for key in structure}
    return next(flat)


def nested_map(fn: Callable[..., Any], *t: Any) -> Any:
    """Apply a function to the leaves of structures that are nested alike."""
    if not t:
        raise ValueError("expected at least one structure")
    if any(not nested_compare(t[0], other) for other in t[1:]):
        raise ValueError("the structures are not nested alike")
    flat = map(nested_flatten, t)
    return nested_pack(map(fn, *flat), t[0])
