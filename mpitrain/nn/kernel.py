"""The compiled loops of layers, where they were built: what `kernel.c` does, called from Python.

They are optional.  Without them the same values are computed in NumPy, and slower: those of pooling and ReLU with the
same bits, but for the sign of a maximum among zeros of both signs, which NumPy leaves to the processor; all others
within rounding.  Exponentials and sums over rows are for float32 only.  Each function here tells whether there is a
loop for its arrays; if not, it has done nothing.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int64
from pathlib import Path

from mpitrain._typing import Array
from mpitrain.arrays.compiled import CompiledLibrary, address

LIBRARY = CompiledLibrary(Path(__file__).with_name("_kernel.so"), "mpitrain_nn_abi", 2)

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


class _Patching(ctypes.Structure):
    """How patches lie in images; `kernel.c` says what each number is."""

    _fields_ = [
        (name, c_int64)
        for name in ("images", "rows", "columns", "lines", "run", "image_step", "row_step", "column_step", "line_step")
    ]


def take_patches(images: Array, patches: Array, stride: tuple[int, int]) -> bool:
    """Write the patch under each output pixel of a convolution.

    Parameters
    ----------
    images : array, shape (n, H, W, channels)
        With their borders.
    patches : array, shape (n, H', W', KH, KW, channels)
        Written to.
    stride : (int, int)
        Pixels from patch to patch, down and across.
    """
    run = LIBRARY.loop_over("mpitrain_take_patches", "vvv", images, patches)
    if run is None:
        return False
    run(address(images), address(patches), byref(_patching(images, patches, stride)))
    return True


def add_patches(patches: Array, images: Array, stride: tuple[int, int]) -> bool:
    """Add patches to the pixels that `take_patches` takes them from."""
    run = LIBRARY.loop_over("mpitrain_add_patches", "vvv", patches, images)
    if run is None:
        return False
    run(address(patches), address(images), byref(_patching(images, patches, stride)))
    return True


def adds_patches_to(images: Array) -> bool:
    """Tell whether there is a loop that does so for such arrays."""
    return LIBRARY.loop_over("mpitrain_add_patches", "vvv", images) is not None


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


def gelu(x: Array, y: Array) -> bool:
    """Write the GELU of ``x``, in its tanh form, to ``y``."""
    run = LIBRARY.loop_over("mpitrain_gelu", "vvn", x, y)
    if run is None:
        return False
    run(address(x), address(y), x.size)
    return True


def gelu_gradient(x: Array, dy: Array, dx: Array) -> bool:
    """Write ``dy`` times the slope of GELU at ``x``; all of one shape."""
    run = LIBRARY.loop_over("mpitrain_gelu_gradient", "vvvn", x, dy, dx) if dy.shape == x.shape else None
    if run is None:
        return False
    run(address(x), address(dy), address(dx), x.size)
    return True


def layer_norm(x: Array, gamma: Array, beta: Array, normal: Array, inverse: Array, y: Array, eps: float) -> bool:
    """Normalise the last axis: write ``normal``, 1/σ to ``inverse``, of shape (…, 1), and the output to ``y``."""
    arrays = x, gamma, beta, normal, inverse, y
    run = LIBRARY.loop_over("mpitrain_layer_norm", "vvvvvvnnd", *arrays)
    if run is None:
        return False
    run(*map(address, arrays), inverse.size, gamma.size, eps)
    return True


def layer_norm_input(normal: Array, inverse: Array, gamma: Array, dy: Array, dx: Array) -> bool:
    """Write the gradient with respect to the input of `layer_norm`."""
    arrays = normal, inverse, gamma, dy, dx
    run = LIBRARY.loop_over("mpitrain_layer_norm_input", "vvvvvnn", *arrays) if dy.shape == normal.shape else None
    if run is None:
        return False
    run(*map(address, arrays), inverse.size, gamma.size)
    return True


def layer_norm_weight(normal: Array, dy: Array, dgamma: Array, dbeta: Array) -> bool:
    """Add the gradients with respect to gamma and beta of `layer_norm`."""
    arrays = normal, dy, dgamma, dbeta
    run = LIBRARY.loop_over("mpitrain_layer_norm_weight", "vvvvnn", *arrays) if dy.shape == normal.shape else None
    if run is None:
        return False
    run(*map(address, arrays), dy.size // dgamma.size, dgamma.size)
    return True


def causal_exponentials(scores: Array, totals: Array, scale: float) -> bool:
    """Turn a block of scores into ``exp((score − maximum) · scale)``, 0 for keys of the future, and write their sums.

    Parameters
    ----------
    scores : array, shape (n, heads, queries, keys)
        The last query is that of the last key.
    totals : array, shape (n, heads, length, 1)
        Of all queries; those of the block, whose number is that of the keys less theirs, are written.
    """
    run = LIBRARY.loop_over("mpitrain_causal_exponentials", "vvnnnnd", scores, totals)
    if run is None:
        return False
    run(address(scores), *_of_block(totals, scores), scale)
    return True


def causal_slopes(slopes: Array, weights: Array, means: Array, scale: float) -> bool:
    """Make each slope (slope − its query's mean) · weight · scale; arrays are laid out as for `causal_exponentials`."""
    run = LIBRARY.loop_over("mpitrain_causal_slopes", "vvvnnnnd", slopes, weights, means)
    if run is None:
        return False
    run(address(slopes), address(weights), *_of_block(means, slopes), scale)
    return True


def divide_heads(outputs: Array, totals: Array) -> bool:
    """Divide outputs, shape (n, length, heads · size), by their totals, shape (n, heads, length, 1), in place."""
    run = LIBRARY.loop_over("mpitrain_divide_heads", "vvnnnn", outputs, totals)
    if run is None:
        return False
    run(address(outputs), address(totals), *_of_heads(outputs, totals))
    return True


def divided_heads(dy: Array, outputs: Array, totals: Array, gradient: Array, means: Array) -> bool:
    """Write ``dy`` over the totals, head by head, shape (n, heads, length, size), and its row sums with the outputs."""
    arrays = dy, outputs, totals, gradient, means
    run = LIBRARY.loop_over("mpitrain_divided_heads", "vvvvvnnnn", *arrays)
    if run is None:
        return False
    run(*map(address, arrays), *_of_heads(outputs, totals))
    return True


def _of_heads(outputs: Array, totals: Array) -> tuple[int, ...]:
    """Return samples, places, heads, and the size of a head."""
    n, heads, length, _ = totals.shape
    return n, length, heads, outputs.shape[2] // heads


def _of_block(values: Array, scores: Array) -> tuple[int, ...]:
    """Return where values of a block's queries begin, and the sizes that loops over its scores take."""
    n, heads, queries, keys = scores.shape
    return address(values) + (keys - queries) * values.itemsize, n * heads, queries, keys, values.shape[2]


def _patching(images: Array, patches: Array, stride: tuple[int, int]) -> _Patching:
    n, rows, columns, lines, width, channels = patches.shape
    line_step = images.shape[2] * channels
    image_step, row_step, column_step = images.shape[1] * line_step, stride[0] * line_step, stride[1] * channels
    return _Patching(n, rows, columns, lines, width * channels, image_step, row_step, column_step, line_step)


def _tiling(y: Array, window: tuple[int, int]) -> _Tiling:
    count, rows, columns, channels = y.shape
    return _Tiling(count * rows, columns, channels, *window)
