"""The compiled loops of layers, where they were built: what `kernel.c` does, called from Python.

They are optional.  Without them the same values are computed in NumPy, and slower: those of pooling and ReLU with the
same bits, but for the sign of a maximum among zeros of both signs, which NumPy leaves to the processor; all others
within rounding.  Exponentials and sums over rows are for float32 only.  Each function here tells whether there is a
loop for its arrays, or a kernel where they are CuPy's; if not, it has done nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_int64
from functools import wraps
from pathlib import Path
from typing import Any

from mpitrain._typing import Array
from mpitrain.arrays import is_cupy
from mpitrain.arrays.compiled import CompiledLibrary, address
from mpitrain.nn import kernel_cuda

LIBRARY = CompiledLibrary(Path(__file__).with_name("_kernel.so"), "mpitrain_nn_abi", 3)

_RELU_FROM = 1 << 16
"""Elements; for fewer NumPy's calls take less time than to get to the loop."""


def _on_gpus_too(loop: Callable[..., bool]) -> Callable[..., bool]:
    """Let a function turn to the one of the same name in `mpitrain.nn.kernel_cuda` where its first array is CuPy's."""
    kernels: Callable[..., bool] = getattr(kernel_cuda, loop.__name__)

    @wraps(loop)
    def either(x: Array, *more: Any) -> bool:
        return kernels(x, *more) if is_cupy(x) else loop(x, *more)

    return either


class _Tiling(ctypes.Structure):
    """How windows tile images; `kernel.c` says what each number is."""

    _fields_ = [(name, c_int64) for name in ("rows", "columns", "channels", "height", "width")]


class _Patching(ctypes.Structure):
    """How patches lie in images; `kernel.c` says what each number is."""

    _fields_ = [
        (name, c_int64)
        for name in (
            "images", "rows", "columns", "lines", "width", "channels", "image_rows", "image_width", "down", "across",
            "top", "left",
        )
    ]  # fmt: skip


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
    return _run("max_pool", (x, y), "v", byref(_tiling(y, window)))


def max_pool_gradient(x: Array, y: Array, dy: Array, dx: Array, window: tuple[int, int]) -> bool:
    """Write the gradient with respect to the images; ``dx`` is of their shape, ``dy`` of the maxima's."""
    return dy.shape == y.shape and _run("max_pool_gradient", (x, y, dy, dx), "v", byref(_tiling(y, window)))


def take_patches(images: Array, patches: Array, stride: tuple[int, int], padding: tuple[int, int]) -> bool:
    """Write the patch under each output pixel of a convolution.

    Parameters
    ----------
    images : array, shape (n, H, W, channels)
        Without their borders.
    patches : array, shape (n, H', W', KH, KW, channels)
        Written to.
    stride, padding : (int, int)
        Pixels from patch to patch, and of the border of zeros, down and across.
    """
    return _run("take_patches", (images, patches), "v", byref(_patching(images, patches, stride, padding)))


def add_patches(patches: Array, images: Array, stride: tuple[int, int], padding: tuple[int, int]) -> bool:
    """Add patches to the pixels that `take_patches` takes them from; what belongs to the border is dropped."""
    return _run("add_patches", (patches, images), "v", byref(_patching(images, patches, stride, padding)))


def has_patches_of(images: Array) -> bool:
    """Tell whether there are loops that do so for such arrays."""
    return LIBRARY.loop_over("mpitrain_add_patches", "vvv", images) is not None


def relu(x: Array, y: Array) -> bool:
    """Write max(x, 0) to ``y``, which may be ``x``.  Few elements are left to NumPy."""
    return x.size >= _RELU_FROM and _run("relu", (x, y), "n", x.size)


def relu_gradient(y: Array, dy: Array, dx: Array) -> bool:
    """Write ``dy`` where y > 0, else zeros, to ``dx``, which may be ``dy``.  Few elements are left to NumPy."""
    return dy.shape == y.shape and y.size >= _RELU_FROM and _run("relu_gradient", (y, dy, dx), "n", y.size)


@_on_gpus_too
def gelu(x: Array, y: Array) -> bool:
    """Write the GELU of ``x``, in its tanh form, to ``y``."""
    return _run("gelu", (x, y), "n", x.size)


@_on_gpus_too
def gelu_gradient(x: Array, dy: Array, dx: Array) -> bool:
    """Write ``dy`` times the slope of GELU at ``x``; all of one shape."""
    return dy.shape == x.shape and _run("gelu_gradient", (x, dy, dx), "n", x.size)


@_on_gpus_too
def layer_norm(x: Array, gamma: Array, beta: Array, normal: Array, inverse: Array, y: Array, eps: float) -> bool:
    """Normalise the last axis: write ``normal``, 1/σ to ``inverse``, of shape (…, 1), and the output to ``y``."""
    return _run("layer_norm", (x, gamma, beta, normal, inverse, y), "nnd", inverse.size, gamma.size, eps)


@_on_gpus_too
def layer_norm_input(normal: Array, inverse: Array, gamma: Array, dy: Array, dx: Array) -> bool:
    """Write the gradient with respect to the input of `layer_norm`."""
    arrays = normal, inverse, gamma, dy, dx
    return dy.shape == normal.shape and _run("layer_norm_input", arrays, "nn", inverse.size, gamma.size)


def layer_norm_weight(normal: Array, dy: Array, dgamma: Array, dbeta: Array) -> bool:
    """Add the gradients with respect to gamma and beta of `layer_norm`."""
    arrays, features = (normal, dy, dgamma, dbeta), dgamma.size
    return dy.shape == normal.shape and _run("layer_norm_weight", arrays, "nn", dy.size // features, features)


@_on_gpus_too
def causal_exponentials(scores: Array, totals: Array, scale: float) -> bool:
    """Turn a block of scores into ``exp((score − maximum) · scale)``, 0 for keys of the future, and write their sums.

    Parameters
    ----------
    scores : array, shape (n, heads, queries, keys)
        The last query is that of the last key.
    totals : array, shape (n, heads, length, 1)
        Of all queries; those of the block are written.
    """
    return _run("causal_exponentials", (scores, totals), "nnnnd", *_of_block(scores, totals), scale)


@_on_gpus_too
def causal_slopes(slopes: Array, weights: Array, means: Array, scale: float) -> bool:
    """Make each slope (slope − its query's mean) · weight · scale; arrays are laid out as for `causal_exponentials`."""
    return _run("causal_slopes", (slopes, weights, means), "nnnnd", *_of_block(slopes, means), scale)


def divide_heads(outputs: Array, totals: Array) -> bool:
    """Divide outputs, shape (n, length, heads · size), by their totals, shape (n, heads, length, 1), in place."""
    return _run("divide_heads", (outputs, totals), "nnnn", *_of_heads(outputs, totals))


@_on_gpus_too
def divided_heads(dy: Array, outputs: Array, totals: Array, gradient: Array, means: Array) -> bool:
    """Write ``dy`` over the totals, head by head, shape (n, heads, length, size), and its row sums with the outputs."""
    return _run("divided_heads", (dy, outputs, totals, gradient, means), "nnnn", *_of_heads(outputs, totals))


def _run(name: str, arrays: tuple[Array, ...], more: str, *arguments: Any) -> bool:
    """Run a loop over arrays, and over further arguments of the kinds ``more``, if there is one for such arrays."""
    run = LIBRARY.loop_over(f"mpitrain_{name}", "v" * len(arrays) + more, *arrays)
    if run is None:
        return False
    run(*map(address, arrays), *arguments)
    return True


def _tiling(y: Array, window: tuple[int, int]) -> _Tiling:
    count, rows, columns, channels = y.shape
    return _Tiling(count * rows, columns, channels, *window)


def _patching(images: Array, patches: Array, stride: tuple[int, int], padding: tuple[int, int]) -> _Patching:
    return _Patching(*patches.shape, *images.shape[1:3], *stride, *padding)


def _of_block(scores: Array, values: Array) -> tuple[int, ...]:
    """Return heads, queries and keys of a block, and of how many queries values are."""
    n, heads, queries, keys = scores.shape
    return n * heads, queries, keys, values.shape[2]


def _of_heads(outputs: Array, totals: Array) -> tuple[int, ...]:
    """Return samples, places, heads, and the size of a head."""
    n, heads, length, _ = totals.shape
    return n, length, heads, outputs.shape[2] // heads
