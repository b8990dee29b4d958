"""The fully connected layer."""

from __future__ import annotations

from collections.abc import Sequence

from mpitrain._typing import Array, Tree
from mpitrain.arrays import unwritten
from mpitrain.nn import checks
from mpitrain.nn.initial import he_uniform, zeros
from mpitrain.nn.layer import Call, Context, Layer, Parameter
from mpitrain.nn.reductions import column_sums


class Linear(Layer):
    """``y = x W + b`` on the last axis: (n, …, inputs) to (n, …, outputs).

    Parameters
    ----------
    inputs, outputs : int
        Sizes of the last axis.  ``weight`` has shape (inputs, outputs), drawn by `he_uniform`.
    bias : bool
        Whether to add ``bias``, shape (outputs,), initially zero.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        self.inputs = checks.positive("Linear: inputs", inputs)
        self.outputs = checks.positive("Linear: outputs", outputs)
        self.bias = bias

    def parameters(self) -> Sequence[Parameter]:
        """Return the weight, and the bias if there is one."""
        weight = Parameter("weight", (self.inputs, self.outputs), he_uniform(self.inputs))
        bias = Parameter("bias", (self.outputs,), zeros, "no_decay")
        return (weight, bias) if self.bias else (weight,)

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Return ``x W + b``."""
        checks.last_axis("Linear", x, self.inputs)
        context = call.context()
        y = context.take((*x.shape[:-1], self.outputs), x.dtype)
        call.xp.matmul(_rows(x), params["weight"], out=_rows(y))
        if self.bias:
            y += params["bias"]
        context["x"] = x
        return y, context

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Return ``dy Wᵀ``."""
        dx = context.take(context["x"].shape, dy.dtype)
        call.xp.matmul(_rows(dy), params["weight"].T, out=_rows(dx))
        return dx

    def backward_weight(self, grads: Tree, context: Context, dy: Array, call: Call) -> None:
        """Add ``xᵀ dy``, and the sums of ``dy`` for the bias."""
        x, dy_rows = _rows(context["x"]), _rows(dy)
        weight = unwritten(grads, "weight")
        if weight is not None:
            call.xp.matmul(x.T, dy_rows, out=weight)
        else:
            product = call.take((self.inputs, self.outputs), dy.dtype)
            call.xp.matmul(x.T, dy_rows, out=product)
            grads["weight"][...] += product
            call.give(product)
        if self.bias:
            grads["bias"][...] += column_sums(dy, call)


def _rows(x: Array) -> Array:
    """Return ``x`` as a matrix of its last axis; BLAS gets one product instead of one per sample."""
    return x.reshape(x.size // x.shape[-1], x.shape[-1])
