"""What `mpitrain.nn.kernel` does, on a GPU: one kernel, or a few, where array operations would be three to fifteen.

Arguments and sources are told there.  Values are within rounding of those of the array operations.  Each function tells
whether there are kernels for its arrays, which are CuPy's: for float32 and float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpitrain import _env
from mpitrain._typing import Array
from mpitrain.arrays import namespace
from mpitrain.arrays.kernels_cuda import elementwise, row_sums

_ARGUMENT = "const T slope = (T)0.7978845608028654, cubic = (T)0.035677408136300125, square = x * x;"
_GELU = f"{_ARGUMENT} y = (T)0.5 * x * (1 + tanh(x * (slope + cubic * square)));"
_GELU_GRADIENT = f"""
{_ARGUMENT}
const T t = tanh(x * (slope + cubic * square));
dx = dy * (T)0.5 * ((1 - t * t) * x * (slope + 3 * cubic * square) + t + 1);
"""


def gelu(x: Array, y: Array) -> bool:
    """One kernel."""
    return _each("gelu", "T x", "T y", _GELU, x, y)


def gelu_gradient(x: Array, dy: Array, dx: Array) -> bool:
    """One kernel."""
    return _each("gelu_gradient", "T x, T dy", "T dx", _GELU_GRADIENT, x, dy, dx)


def layer_norm(x: Array, gamma: Array, beta: Array, normal: Array, inverse: Array, y: Array, eps: float) -> bool:
    """Two sums over rows, and two kernels.

    The mean is taken off first: were it broadcast in the second sum, CuPy would cut rows by how many there are.
    """
    if not _fit(x):
        return False
    mean, share = namespace(x).empty_like(inverse), 1.0 / gamma.size
    row_sums("mean", "T x, T share", "x * share")(x, share, mean)
    _each("centred", "T x, T mean", "T y", "y = x - mean;", x, mean, normal)
    deviation = row_sums("deviation", "T x, T share", "x * x * share", f"1 / sqrt(a + (T){float(eps)!r})")
    deviation(normal, share, inverse)
    return _each(
        "layer_norm", "T inverse, T gamma, T beta", "T normal, T y",
        "normal *= inverse; y = normal * gamma + beta;", inverse, gamma, beta, normal, y,
    )  # fmt: skip


def layer_norm_input(normal: Array, inverse: Array, gamma: Array, dy: Array, dx: Array) -> bool:
    """Two sums over rows, and one kernel."""
    if not _fit(dy):
        return False
    xp, share = namespace(dy), 1.0 / gamma.size
    mean, along = xp.empty_like(inverse), xp.empty_like(inverse)
    row_sums("scaled_mean", "T dy, T gamma, T share", "dy * gamma * share")(dy, gamma, share, mean)
    projection = row_sums("projection", "T dy, T gamma, T normal, T share", "dy * gamma * normal * share")
    projection(dy, gamma, normal, share, along)
    return _each(
        "layer_norm_input", "T dy, T gamma, T normal, T mean, T along, T inverse", "T dx",
        "dx = (dy * gamma - mean - normal * along) * inverse;", dy, gamma, normal, mean, along, inverse, dx,
    )  # fmt: skip


def causal_exponentials(scores: Array, totals: Array, scale: float) -> bool:
    """Two kernels, a maximum and a sum over rows."""
    if not _fit(scores):
        return False
    queries, keys = scores.shape[2:]
    _each(
        "causal_mask", "T x, int64 queries, int64 keys, T least", "T y",
        "y = i % keys > i / keys % queries + keys - queries ? least : x;", scores, queries, keys, -np.inf, scores,
    )  # fmt: skip
    peaks = scores.max(axis=3, keepdims=True)
    _each(
        "causal_exponentials", "T x, T peak, T scale", "T y", "y = exp((x - peak) * scale);",
        scores, peaks, scale, scores,
    )  # fmt: skip
    scores.sum(axis=3, keepdims=True, out=totals[:, :, keys - queries : keys])
    return True


def causal_slopes(slopes: Array, weights: Array, means: Array, scale: float) -> bool:
    """One kernel."""
    queries, keys = slopes.shape[2:]
    return _each(
        "causal_slopes", "T slope, T weight, T mean, T scale", "T y", "y = (slope - mean) * weight * scale;",
        slopes, weights, means[:, :, keys - queries : keys], scale, slopes,
    )  # fmt: skip


def divided_heads(dy: Array, outputs: Array, totals: Array, gradient: Array, means: Array) -> bool:
    """One kernel, and one sum over rows."""
    if not _each("divided_heads", "T dy, T total", "T y", "y = dy / total;", _per_head(dy, totals), totals, gradient):
        return False
    row_sums("head_means", "T gradient, T y", "gradient * y")(gradient, _per_head(outputs, totals), means)
    return True


def _per_head(outputs: Array, totals: Array) -> Array:
    """Return outputs, shape (n, length, heads · size), as (n, heads, length, size)."""
    n, heads, length, _ = totals.shape
    view: Array = outputs.reshape(n, length, heads, outputs.shape[2] // heads).transpose(0, 2, 1, 3)
    return view


def _fit(x: Array) -> bool:
    return x.dtype in (np.float32, np.float64) and _env.kernel()


def _each(name: str, given: str, made: str, code: str, x: Array, *more: Any) -> bool:
    """Run a kernel over elements, if there is one for such arrays as ``x``."""
    if not _fit(x):
        return False
    elementwise(name, given, made, code)(x, *more)
    return True
