"""Cuts a network between its layers: the units that are never divided, and a range of them as a layer of its own.

Nested `Sequential` s count as one long row of layers, so that a transformer block is two units.  A part keeps the
nesting, and with it the names of parameters and random streams: it computes what the whole computes at that place.
"""

from __future__ import annotations

from typing import TypeGuard

from mpitrain.nn.containers import Sequential
from mpitrain.nn.layer import Layer


def units(layer: Layer, path: str = "") -> list[tuple[str, Layer]]:
    """Return path and layer of each unit, in the order in which they are computed.

    Parameters
    ----------
    layer : Layer
        A `Sequential`, which may hold others; any other layer is one unit.
    path : str
        What the names begin with.
    """
    if not _divides(layer):
        return [(path, layer)]
    named = [(f"{path}.{name}" if path else name, child) for name, child in layer.children]
    return [unit for name, child in named for unit in units(child, name)]


def part(layer: Sequential, start: int, stop: int) -> Sequential:
    """Return the units ``start`` to ``stop`` of a `Sequential` as one."""
    kept: dict[str, Layer] = {}
    number = 0
    for name, child in layer.children:
        length = len(units(child))
        low, high = max(start - number, 0), min(stop - number, length)
        if low < high:
            kept[name] = part(child, low, high) if _divides(child) and high - low < length else child
        number += length
    return Sequential(**kept)


def _divides(layer: Layer) -> TypeGuard[Sequential]:
    """Tell whether a layer runs its children one after another: a `Sequential` whose `forward` is not overridden."""
    return isinstance(layer, Sequential) and type(layer).forward is Sequential.forward
