"""Windows that slide over images: where they start, and the view of all pixels that lie at one place in them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from mpitrain._typing import Array, Shape


def output_size(shape: Shape, size: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """Return how many windows fit into images of ``shape`` (n, H, W, channels), down and across."""
    return (shape[1] - size[0]) // stride[0] + 1, (shape[2] - size[1]) // stride[1] + 1


def offsets(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield (row, column) of each place in a window."""
    return product(range(size[0]), range(size[1]))


def window(x: Array, row: int, column: int, output_shape: Shape, stride: tuple[int, int]) -> Array:
    """Return the view of the pixels that lie at (row, column) of each window, shape (n, H', W', channels of x)."""
    bottom, right = row + stride[0] * output_shape[1], column + stride[1] * output_shape[2]
    return x[:, row : bottom : stride[0], column : right : stride[1]]
