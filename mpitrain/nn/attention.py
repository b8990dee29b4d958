"""Causal attention: each position of a sequence takes from those before it and from itself."""

from __future__ import annotations

from math import sqrt

from mpitrain._errors import InputError
from mpitrain._typing import Array, Tree
from mpitrain.arrays import is_cupy
from mpitrain.nn import checks, kernel
from mpitrain.nn.layer import Call, Context, Layer
from mpitrain.nn.reductions import row_sums
from mpitrain.nn.wide import in_float32

_BLOCK = 64
"""Queries that are taken at a time.  Keys beyond the block's last query are left out, not masked."""

_GPU_BLOCK = 256
"""The same on a GPU, where few large products take less time than many small ones."""


@in_float32
class CausalAttention(Layer):
    """``softmax(Q Kᵀ / √size) V`` of each head, over the past alone: (n, t, 3 · heads · size) to (n, t, heads · size).

    It has no parameters: linear layers before and after it make queries, keys and values of the features, and mix the
    heads.  Columns of the input lie head by head, and in a head query, key and value one after the other, so that some
    of the heads are some contiguous columns of the linear layer before, and rows of the one after.

    Parameters
    ----------
    heads : int
        Number of heads.

    Notes
    -----
    Vaswani and others, "Attention is all you need", NeurIPS 2017, equation 1.  Half of the t² scores of a head (on a
    GPU, of a short sequence all) are computed and kept, as ``exp((score − maximum) / √size)``; what they are to be
    divided by is applied to the heads' outputs and their gradients, which are smaller.  Backward: with ``P`` the
    softmax and ``O`` the output, the scores' gradient is ``P ∘ (dO Vᵀ − rowsum(dO ∘ O))``: Dao, Fu, Ermon, Rudra, Ré,
    "FlashAttention", NeurIPS 2022, appendix B.2.
    """

    def __init__(self, heads: int) -> None:
        self.heads = checks.positive("CausalAttention: heads", heads)

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Mix the values of the past."""
        self._check(x)
        context = call.context()
        n, length, columns = x.shape
        y = context.take((n, length, columns // 3), x.dtype)
        query, key, value, out = *self._parts(x), self._per_head(y)
        totals, scale = context.take((*query.shape[:3], 1), x.dtype), 1.0 / sqrt(query.shape[3])
        blocks = query_blocks(length, _block_of(x))
        weights = [context.take((*query.shape[:2], stop - start, stop), x.dtype) for start, stop in blocks]
        for (start, stop), block in zip(blocks, weights, strict=True):
            call.xp.matmul(query[:, :, start:stop], key[:, :, :stop].swapaxes(2, 3), out=block)
            if not kernel.causal_exponentials(block, totals, scale):
                _exponentials(block, totals[:, :, start:stop], scale, call)
            call.xp.matmul(block, value[:, :, :stop], out=out[:, :, start:stop])
        if not kernel.divide_heads(y, totals):
            out /= totals
        context["x"], context["y"], context["totals"], context["weights"] = x, y, totals, weights
        return y, context

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Return the gradient of queries, keys and values."""
        xp, x = call.xp, context["x"]
        query, key, value = self._parts(x)
        scale = 1.0 / sqrt(query.shape[3])
        dx = context.take(x.shape, dy.dtype)
        d_query, d_key, d_value = self._parts(dx)
        gradient, means = call.take(query.shape, dy.dtype), call.take(context["totals"].shape, dy.dtype)
        self._divide(context, dy, gradient, means, call)
        blocks = query_blocks(x.shape[1], _block_of(x))
        for (start, stop), block in reversed([*zip(blocks, context["weights"], strict=True)]):
            slope = call.take(block.shape, dy.dtype)
            xp.matmul(gradient[:, :, start:stop], value[:, :, :stop].swapaxes(2, 3), out=slope)
            if not kernel.causal_slopes(slope, block, means, scale):
                slope -= means[:, :, start:stop]
                slope *= block
                slope *= scale
            xp.matmul(slope, key[:, :, :stop], out=d_query[:, :, start:stop])
            is_first = stop == x.shape[1]  # of those from the end, and over all keys
            _put(slope, query[:, :, start:stop], d_key[:, :, :stop], is_first, call)
            _put(block, gradient[:, :, start:stop], d_value[:, :, :stop], is_first, call)
            call.give(slope)
        call.give(gradient, means)
        return dx

    def _divide(self, context: Context, dy: Array, gradient: Array, means: Array, call: Call) -> None:
        """Write ``dO`` over the totals, head by head, to ``gradient``, and its row sums with ``O`` to ``means``."""
        if kernel.divided_heads(dy, context["y"], context["totals"], gradient, means):
            return
        call.xp.divide(self._per_head(dy), context["totals"], out=gradient)
        product = call.take(gradient.shape, dy.dtype)
        call.xp.multiply(gradient, self._per_head(context["y"]), out=product)
        row_sums(product, means, call)
        call.give(product)

    def _parts(self, x: Array) -> tuple[Array, Array, Array]:
        """Return views of queries, keys and values, each of shape (n, heads, t, size)."""
        n, length, columns = x.shape
        parts = x.reshape(n, length, self.heads, 3, columns // (3 * self.heads)).transpose(3, 0, 2, 1, 4)
        return parts[0], parts[1], parts[2]

    def _per_head(self, y: Array) -> Array:
        """Return a view of shape (n, heads, t, size)."""
        n, length, columns = y.shape
        view: Array = y.reshape(n, length, self.heads, columns // self.heads).transpose(0, 2, 1, 3)
        return view

    def _check(self, x: Array) -> None:
        if x.ndim != 3 or not x.shape[2] or x.shape[2] % (3 * self.heads):
            raise InputError(
                "CausalAttention: the input does not fit", got=f"shape {x.shape}",
                expected=f"shape (n, t, a multiple of {3 * self.heads}): query, key and value of {self.heads} heads",
            )  # fmt: skip


def query_blocks(length: int, most: int = _BLOCK) -> list[tuple[int, int]]:
    """Return (first query, last query plus one) of each block; the latter is also its number of keys."""
    return [(start, min(start + most, length)) for start in range(0, length, most)]


def _block_of(x: Array) -> int:
    return _GPU_BLOCK if is_cupy(x) else _BLOCK


def _exponentials(scores: Array, totals: Array, scale: float, call: Call) -> None:
    """Do what `mpitrain.nn.kernel.causal_exponentials` does, but for totals of the block's queries alone.

    Parameters
    ----------
    scores : array, shape (n, heads, queries, keys)
        The last query is that of the last key.
    totals : array, shape (n, heads, queries, 1)
        Written.
    """
    xp, queries = call.xp, scores.shape[2]
    future = xp.triu(xp.full((queries, queries), -xp.inf, scores.dtype), 1)
    scores[..., -queries:] += future
    scores -= scores.max(axis=3, keepdims=True)
    scores *= scale
    xp.exp(scores, out=scores)
    row_sums(scores, totals, call)


def _put(left: Array, right: Array, out: Array, is_first: bool, call: Call) -> None:
    """Write ``leftᵀ right`` to ``out``, or add it there unless it is the first."""
    if is_first:
        call.xp.matmul(left.swapaxes(2, 3), right, out=out)
        return
    product = call.take(out.shape, out.dtype)
    call.xp.matmul(left.swapaxes(2, 3), right, out=product)
    out += product
    call.give(product)
