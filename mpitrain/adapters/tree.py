"""How an adapter reads a parameter and hands a gradient over: the place is looked up by name."""

from __future__ import annotations

from typing import Any

from mpitrain._typing import Array, Tree
from mpitrain.arrays import unwritten


def find(tree: Tree, name: str) -> Any:
    """Return what a dotted name stands for."""
    for part in name.split("."):
        tree = tree[part]
    return tree


def add(tree: Tree, name: str, values: Array) -> None:
    """Add to the gradient of a dotted name, or overwrite one that nothing was added to yet."""
    path, _, leaf = name.rpartition(".")
    tree = find(tree, path) if path else tree
    place = unwritten(tree, leaf)
    if place is None:
        tree[leaf][...] += values
    else:
        place[...] = values
