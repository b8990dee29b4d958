"""How an adapter hands a gradient over: the place is looked up by name, and written or added to."""

from __future__ import annotations

from mpitrain._typing import Array, Tree
from mpitrain.arrays import unwritten


def add(tree: Tree, name: str, values: Array) -> None:
    """Add to the gradient of a dotted name, or overwrite one that nothing was added to yet."""
    *path, leaf = name.split(".")
    for part in path:
        tree = tree[part]
    place = unwritten(tree, leaf)
    if place is None:
        tree[leaf][...] += values
    else:
        place[...] = values
