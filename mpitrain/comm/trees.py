"""Arrays in nested dictionaries, lists and tuples: taken apart in an order that all ranks share, and put together.

A None in a container is a place without an array, and stays None.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from copy import copy
from typing import Any

from mpitrain._errors import InputError
from mpitrain._options import brief


def leaves(tree: Any, operation: str | None = None) -> Iterator[Any]:
    """Yield what a tree holds; dictionaries in the order of their sorted keys.

    Raises
    ------
    InputError
        The keys of a dictionary have no order; the message names ``operation``.
    """
    if isinstance(tree, Mapping):
        for key in _order(tree, operation):
            if tree[key] is not None:
                yield from leaves(tree[key], operation)
    elif isinstance(tree, (list, tuple)):
        for child in tree:
            if child is not None:
                yield from leaves(child, operation)
    else:
        yield tree


def rebuild(tree: Any, values: Iterable[Any]) -> Any:
    """Return a tree of the same structure, and of the same containers, with ``values`` in place of its leaves."""
    return _rebuild(tree, iter(values))


def leaves_like(operation: str, tree: Any, other: Any) -> list[Any]:
    """Return the leaves of ``other``, which must have the structure of ``tree``; as many None if it is None."""
    if other is None:
        return [None for _ in leaves(tree, operation)]
    if not alike(tree, other):
        raise InputError(
            "out has another structure than the input", operation=operation, got=_structure(other),
            expected=_structure(tree),
        )  # fmt: skip
    return list(leaves(other))


def alike(tree: Any, other: Any) -> bool:
    """Tell whether two trees have the same structure."""
    return bool(_structure(tree) == _structure(other))


def _structure(tree: Any) -> Any:
    """Return the tree in plain containers, which are equal whatever the order of their keys."""
    if isinstance(tree, Mapping):
        return {key: _structure(tree[key]) for key in tree}
    if isinstance(tree, (list, tuple)):
        children = map(_structure, tree)
        return list(children) if isinstance(tree, list) else tuple(children)
    return None if tree is None else "array"


def _rebuild(tree: Any, values: Iterator[Any]) -> Any:
    if isinstance(tree, Mapping):
        built = {key: _child(tree[key], values) for key in _order(tree)}
        return _mapping_like(tree, {key: built[key] for key in tree})
    if isinstance(tree, (list, tuple)):
        children = [_child(child, values) for child in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
    return next(values)


def _child(tree: Any, values: Iterator[Any]) -> Any:
    return None if tree is None else _rebuild(tree, values)


def _mapping_like(tree: Mapping[Any, Any], built: dict[Any, Any]) -> Any:
    """Return a mapping of the type of ``tree``, such as ``OrderedDict``."""
    if type(tree) is dict:
        return built
    if not isinstance(tree, MutableMapping):
        return type(tree)(built)  # type: ignore[call-arg]  # as immutable mappings are made
    made = copy(tree)  # with its attributes, in which a state_dict of PyTorch's keeps its versions
    made.update(built)
    return made


def _order(tree: Mapping[Any, Any], operation: str | None = None) -> list[Any]:
    # Two ranks may have filled the same dictionary in different order.
    try:
        return sorted(tree, key=lambda key: (type(key).__name__, key))
    except TypeError as error:
        raise InputError(
            "the keys of a dictionary have no order", operation=operation, got=brief(list(tree)),
            expected="keys that can be sorted, such as strings", remedy="rename them, or hand in a list",
        ) from error  # fmt: skip
