"""What layers have in common of which each rank computes some outputs from the same input."""

from __future__ import annotations

from mpitrain._typing import Array, Tree
from mpitrain.nn import Call, Context, Layer
from mpitrain.parallel.tensor.adjoints import Cut, Pair
from mpitrain.parallel.tensor.call import peer_call


class SharedInput(Layer):
    """Put before a layer of some outputs: brings the whole input, and sums the terms of its gradient.

    Attributes
    ----------
    pair : Pair
        How the input arrives, along axis 1 if it is divided, and its gradient goes back.
    """

    pair: Pair

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Return this rank's outputs."""
        call, gathered = peer_call(call), call.context()
        x = self.pair.forward(x, Cut(1, call.length), gathered, call)
        y, context = super().forward(params, x, call)  # type: ignore[safe-super]  # of the layer that comes next
        context.children.append(gathered)
        return y, context

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Return the input's gradient, summed over the ranks."""
        call = peer_call(call)
        dx = super().backward_input(params, context, dy, call)  # type: ignore[safe-super]
        return self.pair.backward(dx, Cut(1, call.length), context, call)
