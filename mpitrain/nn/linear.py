"""The fully connected layer."""

from __future__ import annotations

from collections.abc import Sequence

from mpitrain._typing import Array, Tree
from mpitrain.nn import checks
from mpitrain.nn.initial import he_uniform, normal, zeros
from mpitrain.nn.layer import Call, Context, Layer, Parameter
from mpitrain.nn.reductions import add_product, column_sums, rows


class Linear(Layer):
    """``y = x W + b`` on the last axis: (n, …, inputs) to (n, …, outputs).

    Parameters
    ----------
    inputs, outputs : int
        Sizes of the last axis.  ``weight`` has shape (inputs, outputs).
    bias : bool
        Whether to add ``bias``, shape (outputs,), initially zero.
    std : float, optional
        Standard deviation of the initial weights, drawn from N(0, std²); None: drawn by `he_uniform`.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, std: float | None = None) -> None:
        self.inputs = checks.positive("Linear: inputs", inputs)
        self.outputs = checks.positive("Linear: outputs", outputs)
        self.bias = bias
        self.std = None if std is None else checks.spread("Linear: std", std)

    def parameters(self) -> Sequence[Parameter]:
        """Return the weight, and the bias if there is one."""
        draw = he_uniform(self.inputs) if self.std is None else normal(self.std)
        weight = Parameter("weight", (self.inputs, self.outputs), draw)
        bias = Parameter("bias", (self.outputs,), zeros, "no_decay")
        return (weight, bias) if self.bias else (weight,)

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Return ``x W + b``."""
        checks.last_axis("Linear", x, self.inputs)
        context = call.context()
        y = context.take((*x.shape[:-1], self.outputs), x.dtype)
        call.xp.matmul(rows(x), params["weight"], out=rows(y))
        if self.bias:
            y += params["bias"]
        context["x"] = x
        return y, context

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Return ``dy Wᵀ``."""
        dx = context.take(context["x"].shape, dy.dtype)
        call.xp.matmul(rows(dy), params["weight"].T, out=rows(dx))
        return dx

    def backward_weight(self, grads: Tree, context: Context, dy: Array, call: Call) -> None:
        """Add ``xᵀ dy``, and the sums of ``dy`` for the bias."""
        add_product(rows(context["x"]), rows(dy), grads, "weight", call)
        if self.bias:
            grads["bias"][...] += column_sums(dy, call)
