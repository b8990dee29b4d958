"""Boxes: which part of a tensor is meant, as a range along each of its axes."""

from __future__ import annotations

from math import prod
from typing import Any

from mpitrain._typing import Array, Shape

Box = tuple[tuple[int, int], ...]
"""A ``(start, stop)`` per axis of the global tensor."""


def inside(box: Box, shape: Shape) -> bool:
    """Tell whether ``box`` lies in a tensor of ``shape``."""
    return len(box) == len(shape) and all(0 <= start <= stop <= n for (start, stop), n in zip(box, shape, strict=True))


def box_size(box: Box) -> int:
    """Return the number of elements of a box."""
    return prod(stop - start for start, stop in box)


def boxed(whole: Array, box: Box) -> Array:
    """Return the part of a tensor that lies in ``box``, as a view."""
    where: tuple[Any, ...] = (*(slice(*bounds) for bounds in box), ...)  # the ellipsis keeps a scalar an array
    view: Array = whole[where]
    return view
