"""Batch normalisation over all samples that share a batch, on whichever ranks they lie."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from mpitrain._options import Interval
from mpitrain._typing import Array, Tree
from mpitrain.nn import checks
from mpitrain.nn.initial import ones, zeros
from mpitrain.nn.layer import Call, Context, Layer, Parameter
from mpitrain.nn.reductions import column_sums
from mpitrain.nn.wide import in_float32


@in_float32
class BatchNorm(Layer):
    """Normalise each feature over the batch, then scale and shift: ``y = gamma (x − mean) / √(var + eps) + beta``.

    Parameters
    ----------
    features : int
        Size of the last axis; statistics are over all others.
    momentum : float
        Rate at which ``running_mean`` and ``running_var``, used in evaluation, follow the batches.
    eps : float
        Added to the variance.

    Notes
    -----
    Ioffe, Szegedy, "Batch normalization", ICML 2015, algorithm 1.  Training normalises by the biased variance;
    ``running_var`` follows the unbiased one, as PyTorch's does (a feature with a single value counts as variance 0).

    Collective in training where the call has a ``reduce``: two reductions forward (features + 1 numbers for the mean,
    features for the variance about it: two passes, so that a large mean costs no digits) and one backward (2 ·
    features), all float64, by every rank, those without samples included.  The gradients of gamma and beta stay sums
    over the local samples, for they are summed over ranks together with all gradients.
    """

    def __init__(self, features: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        self.features = checks.positive("BatchNorm: features", features)
        self.momentum = checks.number("BatchNorm: momentum", momentum, Interval(0, 1, "[]"))
        self.eps = checks.epsilon("BatchNorm: eps", eps)

    def parameters(self) -> Sequence[Parameter]:
        """Return gamma, beta and the running statistics, each of shape (features,)."""
        shape = (self.features,)
        return (
            Parameter("gamma", shape, ones, "no_decay"),
            Parameter("beta", shape, zeros, "no_decay"),
            Parameter("running_mean", shape, zeros, "statistics", self.momentum),
            Parameter("running_var", shape, ones, "statistics", self.momentum),
        )

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Normalise by the batch's statistics in training, by the running ones in evaluation."""
        checks.last_axis("BatchNorm", x, self.features)
        context = call.context()
        centred = context.take(x.shape, x.dtype)
        if call.training:
            variance = self._measure(x, centred, context, call)
        else:
            call.xp.subtract(x, params["running_mean"], out=centred)
            variance = params["running_var"]
        inverse = 1.0 / call.xp.sqrt(variance + self.eps)
        y = context.take(x.shape, x.dtype)
        call.xp.multiply(centred, (params["gamma"] * inverse).astype(x.dtype), out=y)
        y += params["beta"]
        context["centred"], context["inverse"] = centred, inverse
        return y, context

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Return the gradient of the input; the batch's statistics depend on it too."""
        xp, inverse = call.xp, context["inverse"]
        scale = params["gamma"] * inverse
        dx = context.take(dy.shape, dy.dtype)
        xp.multiply(dy, scale.astype(dy.dtype), out=dx)
        if call.training:
            d_beta, d_gamma = call.summed(xp.stack(self._sums(context, dy, call))) / context["count"]
            share = call.take(dy.shape, dy.dtype)
            xp.multiply(context["centred"], (scale * inverse * d_gamma).astype(dy.dtype), out=share)
            share += (scale * d_beta).astype(dy.dtype)
            dx -= share
            call.give(share)
        return dx

    def backward_weight(self, grads: Tree, context: Context, dy: Array, call: Call) -> None:
        """Add the local sums; and in training the statistics, weighted by the count of this rank's samples."""
        d_beta, d_gamma = self._sums(context, dy, call)
        _add(grads["beta"], d_beta)
        _add(grads["gamma"], d_gamma)
        if call.training:
            _add(grads["running_mean"], call.count * context["mean"])
            _add(grads["running_var"], call.count * context["unbiased"])

    def _measure(self, x: Array, centred: Array, context: Context, call: Call) -> Array:
        """Write ``x`` minus the mean into ``centred``; note count, mean and unbiased variance; return the biased."""
        sums = call.xp.empty(self.features + 1, np.float64)
        sums[:-1] = column_sums(x, call)
        sums[-1] = prod(x.shape[:-1])
        sums = call.summed(sums)
        count = call.xp.maximum(sums[-1], 1.0)  # stays where it is: to fetch it would be to wait for a GPU
        mean = sums[:-1] / count
        call.xp.subtract(x, mean.astype(x.dtype), out=centred)
        squares = call.take(x.shape, x.dtype)
        call.xp.multiply(centred, centred, out=squares)
        total = call.summed(column_sums(squares, call).astype(np.float64))
        call.give(squares)
        context["count"], context["mean"], context["unbiased"] = count, mean, total / call.xp.maximum(count - 1.0, 1.0)
        variance: Array = total / count
        return variance

    def _sums(self, context: Context, dy: Array, call: Call) -> tuple[Array, Array]:
        """Return the local sums of dy and of dy · (x − mean)/σ in float64, computed once for both backward passes."""
        if "sums" not in context:
            products = call.take(dy.shape, dy.dtype)
            call.xp.multiply(dy, context["centred"], out=products)
            d_gamma = column_sums(products, call) * context["inverse"]
            call.give(products)
            context["sums"] = column_sums(dy, call).astype(np.float64), d_gamma.astype(np.float64)
        sums: tuple[Array, Array] = context["sums"]
        return sums


def _add(target: Array, values: Array) -> None:
    """Add float64 values to a gradient of any dtype."""
    target += values.astype(target.dtype)
