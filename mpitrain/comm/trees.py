"""Arrays in nested dictionaries, lists and tuples: taken apart in an order that all ranks share, and put together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any

from mpitrain._errors import InputError


def leaves(tree: Any) -> Iterator[Any]:
    """Yield what a tree holds; dictionaries in the order of their sorted keys."""
    if isinstance(tree, Mapping):
        for key in _order(tree):
            yield from leaves(tree[key])
    elif isinstance(tree, (list, tuple)):
        for child in tree:
            yield from leaves(child)
    else:
        yield tree


def rebuild(tree: Any, values: Iterable[Any]) -> Any:
    """Return a tree of the same structure with ``values`` in place of its leaves."""
    return _rebuild(tree, iter(values))


def leaves_like(operation: str, tree: Any, other: Any) -> list[Any]:
    """Return the leaves of ``other``, which must have the structure of ``tree``; as many None if it is None."""
    if other is None:
        return [None for _ in leaves(tree)]
    got, expected = rebuild(other, repeat("array")), rebuild(tree, repeat("array"))
    if got != expected:
        raise InputError("out has another structure than the input", operation=operation, got=got, expected=expected)
    return list(leaves(other))


def _rebuild(tree: Any, values: Iterator[Any]) -> Any:
    if isinstance(tree, Mapping):
        built = {key: _rebuild(tree[key], values) for key in _order(tree)}
        return {key: built[key] for key in tree}
    if isinstance(tree, (list, tuple)):
        children = [_rebuild(child, values) for child in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
    return next(values)


def _order(tree: Mapping[Any, Any]) -> list[Any]:
    # Two ranks may have filled the same dictionary in different order.
    return sorted(tree, key=lambda key: (type(key).__name__, key))
