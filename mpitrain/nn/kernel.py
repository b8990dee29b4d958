"""The compiled loops of layers, where they were built: what `kernel.c` does, called from Python.

They are optional.  Without them the same values are computed in NumPy, and slower; with the same bits, but for the sign
of a maximum among zeros of both signs, which NumPy leaves to the processor.  Each function here tells whether there is
a loop for its arrays; if not, it has done nothing.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int64
from pathlib import Path

from mpitrain._typing import Array
from mpitrain.arrays.compiled import CompiledLibrary, address

LIBRARY = CompiledLibrary(Path(__file__).with_name("_kernel.so"), "mpitrain_nn_abi", 1)

_RELU_FROM = 1 << 16
"""Elements; for fewer NumPy's two calls take less time than to get to the loop."""


class _Tiling(ctypes.Structure):
    """How windows tile images; `kernel.c` says what each number is."""

    _fields_ = [(name, c_int64) for name in ("rows", "columns", "channels", "height", "width")]


def max_pool(x: Array, y: Array, window: tuple[int, int]) -> bool:
    """Write the maximum of each window.

    Parameters
    ----------
    x : array, shape (n, H, W, channels)
        Images, which windows tile.
    y : array, shape (n, H / window[0], W / window[1], channels)
        Written to.
    window : (int, int)
        Height and width.
    """
    run = LIBRARY.loop_over("mpitrain_max_pool", "vvv", x, y)
    if run is None:
        return False
    run(address(x), address(y), byref(_tiling(y, window)))
    return True


def max_pool_gradient(x: Array, y: Array, dy: Array, dx: Array, window: tuple[int, int]) -> bool:
    """Write the gradient with respect to the images; ``dx`` is of their shape, ``dy`` of the maxima's."""
    if dy.shape != y.shape:
        return False
    run = LIBRARY.loop_over("mpitrain_max_pool_gradient", "vvvvv", x, y, dy, dx)
    if run is None:
        return False
    run(address(x), address(y), address(dy), address(dx), byref(_tiling(y, window)))
    return True


def relu_gradient(y: Array, dy: Array, dx: Array) -> bool:
    """Write ``dy`` where y > 0, else zeros; all of one shape.  Few elements are left to NumPy."""
    run = (
        LIBRARY.loop_over("mpitrain_relu_gradient", "vvvn", y, dy, dx)
        if dy.shape == y.shape and y.size >= _RELU_FROM
        else None
    )
    if run is None:
        return False
    run(address(y), address(dy), address(dx), y.size)
    return True


def _tiling(y: Array, window: tuple[int, int]) -> _Tiling:
    count, rows, columns, channels = y.shape
    return _Tiling(count * rows, columns, channels, *window)
