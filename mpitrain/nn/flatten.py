"""From images to rows of numbers."""

from __future__ import annotations

from math import prod

from mpitrain._typing import Array, Tree
from mpitrain.nn.layer import Call, Context, Layer


class Flatten(Layer):
    """Make one axis of all but the first: (n, a, b, …) to (n, a·b·…).  Costs nothing: the output is a view."""

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Return ``x`` as a matrix."""
        context = call.context()
        context["shape"] = x.shape
        return x.reshape(x.shape[0], prod(x.shape[1:])), context

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Return ``dy`` in the shape of the input."""
        return dy.reshape(context["shape"])
