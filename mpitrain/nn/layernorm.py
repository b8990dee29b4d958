"""Layer normalisation: each sample, or each place in it, by itself."""

from __future__ import annotations

from collections.abc import Sequence

from mpitrain._typing import Array, Tree
from mpitrain.nn import checks, kernel
from mpitrain.nn.initial import ones, zeros
from mpitrain.nn.layer import Call, Context, Layer, Parameter
from mpitrain.nn.reductions import column_sums, row_sums
from mpitrain.nn.wide import in_float32


@in_float32
class LayerNorm(Layer):
    """Normalise the last axis, then scale and shift: ``y = gamma (x − mean) / √(var + eps) + beta``.

    Parameters
    ----------
    features : int
        Size of the last axis, over which mean and (biased) variance are taken.
    eps : float
        Added to the variance.

    Notes
    -----
    Ba, Kiros, Hinton, "Layer normalization", 2016, equation 4.
    """

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        self.features = checks.positive("LayerNorm: features", features)
        self.eps = checks.epsilon("LayerNorm: eps", eps)

    def parameters(self) -> Sequence[Parameter]:
        """Return gamma and beta, each of shape (features,)."""
        gamma = Parameter("gamma", (self.features,), ones, "no_decay")
        return gamma, Parameter("beta", (self.features,), zeros, "no_decay")

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Normalise each row."""
        checks.last_axis("LayerNorm", x, self.features)
        context = call.context()
        inverse = context.take((*x.shape[:-1], 1), x.dtype)
        normal, y = context.take(x.shape, x.dtype), context.take(x.shape, x.dtype)
        if not kernel.layer_norm(x, params["gamma"], params["beta"], normal, inverse, y, self.eps):
            self._normalise(params, x, normal, inverse, y, call)
        context["normal"], context["inverse"] = normal, inverse
        return y, context

    def _normalise(self, params: Tree, x: Array, normal: Array, inverse: Array, y: Array, call: Call) -> None:
        xp = call.xp
        row_sums(x, inverse, call, 1.0 / self.features)
        xp.subtract(x, inverse, out=normal)
        xp.multiply(normal, normal, out=y)
        row_sums(y, inverse, call, 1.0 / self.features)
        inverse += self.eps
        xp.sqrt(inverse, out=inverse)
        xp.divide(1, inverse, out=inverse)
        normal *= inverse
        xp.multiply(normal, params["gamma"], out=y)
        y += params["beta"]

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Return ``(g − mean(g) − z mean(g z)) / σ`` with ``g = gamma dy`` and ``z`` the normalised input."""
        xp, normal, inverse = call.xp, context["normal"], context["inverse"]
        dx = context.take(dy.shape, dy.dtype)
        if kernel.layer_norm_input(normal, inverse, params["gamma"], dy, dx):
            return dx
        product, mean = call.take(dy.shape, dy.dtype), call.take(inverse.shape, dy.dtype)
        xp.multiply(dy, params["gamma"], out=dx)
        xp.multiply(dx, normal, out=product)
        row_sums(product, mean, call, 1.0 / self.features)
        xp.multiply(normal, mean, out=product)
        row_sums(dx, mean, call, 1.0 / self.features)
        dx -= mean
        dx -= product
        dx *= inverse
        call.give(product, mean)
        return dx

    def backward_weight(self, grads: Tree, context: Context, dy: Array, call: Call) -> None:
        """Add the gradients of gamma and beta."""
        if kernel.layer_norm_weight(context["normal"], dy, grads["gamma"], grads["beta"]):
            return
        product = call.take(dy.shape, dy.dtype)
        call.xp.multiply(dy, context["normal"], out=product)
        grads["gamma"][...] += column_sums(product, call)
        grads["beta"][...] += column_sums(dy, call)
        call.give(product)
