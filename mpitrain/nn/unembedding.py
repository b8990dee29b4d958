"""Unembedding: features to a score for each vector of a table."""

from __future__ import annotations

from collections.abc import Sequence

from mpitrain._typing import Array, Tree
from mpitrain.nn import checks
from mpitrain.nn.initial import normal
from mpitrain.nn.layer import Call, Context, Layer, Parameter
from mpitrain.nn.reductions import add_product, rows


class Unembedding(Layer):
    """``y = x Wᵀ``: (n, …, features) to (n, …, count).

    The table has the shape of an `Embedding`'s, so that it may be the same tensor (`Layer.ties`).

    Parameters
    ----------
    count : int
        Number of vectors, and of scores.
    features : int
        Length of a vector.  ``weight`` has shape (count, features).
    std : float
        Standard deviation of the initial vectors, drawn from N(0, std²).
    """

    def __init__(self, count: int, features: int, std: float = 0.02) -> None:
        self.count = checks.positive("Unembedding: count", count)
        self.features = checks.positive("Unembedding: features", features)
        self.std = checks.spread("Unembedding: std", std)

    def parameters(self) -> Sequence[Parameter]:
        """Return the table."""
        return (Parameter("weight", (self.count, self.features), normal(self.std)),)

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Return ``x Wᵀ``."""
        checks.last_axis("Unembedding", x, self.features)
        context = call.context()
        y = context.take((*x.shape[:-1], self.count), x.dtype)
        call.xp.matmul(rows(x), params["weight"].T, out=rows(y))
        context["x"] = x
        return y, context

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Return ``dy W``."""
        dx = context.take(context["x"].shape, dy.dtype)
        call.xp.matmul(rows(dy), params["weight"], out=rows(dx))
        return dx

    def backward_weight(self, grads: Tree, context: Context, dy: Array, call: Call) -> None:
        """Add ``dyᵀ x``."""
        add_product(rows(dy), rows(context["x"]), grads, "weight", call)
