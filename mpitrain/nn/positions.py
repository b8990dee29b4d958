"""Learned positions: a vector for each place in a sequence, added to what stands there."""

from __future__ import annotations

from collections.abc import Sequence

from mpitrain._errors import InputError
from mpitrain._typing import Array, Tree
from mpitrain.nn import checks
from mpitrain.nn.initial import normal
from mpitrain.nn.layer import Call, Context, Layer, Parameter
from mpitrain.nn.reductions import sample_sums


class PositionEmbedding(Layer):
    """``y[:, i] = x[:, i] + weight[i]``: (n, t, features) to the same, for any t up to ``count``.

    Parameters
    ----------
    count : int
        Longest sequence.
    features : int
        Size of the last axis.  ``weight`` has shape (count, features) and does not decay.
    std : float
        Standard deviation of the initial vectors, drawn from N(0, std²).

    Notes
    -----
    Gehring and others, "Convolutional sequence to sequence learning", ICML 2017, section 3.1.
    """

    def __init__(self, count: int, features: int, std: float = 0.02) -> None:
        self.count = checks.positive("PositionEmbedding: count", count)
        self.features = checks.positive("PositionEmbedding: features", features)
        self.std = checks.spread("PositionEmbedding: std", std)

    def parameters(self) -> Sequence[Parameter]:
        """Return the table."""
        return (Parameter("weight", (self.count, self.features), normal(self.std), "no_decay"),)

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Add the vectors of the first t positions."""
        if x.ndim != 3 or x.shape[2] != self.features or x.shape[1] > self.count:
            raise InputError(
                "PositionEmbedding: the input does not fit", got=f"shape {x.shape}",
                expected=f"shape (n, at most {self.count}, {self.features})",
            )  # fmt: skip
        context = call.context()
        y = context.take(x.shape, x.dtype)
        call.xp.add(x, params["weight"][self._places(x, call)], out=y)
        return y, context

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Return ``dy``."""
        return dy

    def backward_weight(self, grads: Tree, context: Context, dy: Array, call: Call) -> None:
        """Add the sums of ``dy`` over the samples."""
        grads["weight"][self._places(dy, call)] += sample_sums(dy, call)

    def _places(self, x: Array, call: Call) -> slice:
        """Return which places of the sequence these are."""
        return slice(0, x.shape[1])
