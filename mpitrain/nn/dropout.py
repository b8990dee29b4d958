"""Dropout whose masks do not depend on how the batch is spread over ranks."""

from __future__ import annotations

from math import prod

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array, Tree
from mpitrain.nn import checks
from mpitrain.nn.layer import Call, Context, Layer


class Dropout(Layer):
    """In training, zero each element with probability ``p`` and scale the others by 1 / (1 − p).

    Parameters
    ----------
    p : float
        Probability in [0, 1).

    Notes
    -----
    Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, JMLR 15, 2014, with the scaling at training time.  An
    element is kept if a random 32-bit word is at least p · 2³²; the word is a function of the step, the layer's path,
    the sample's position in the global batch and the element's position in the sample, and so the same on every
    layout and for every dtype.
    """

    def __init__(self, p: float) -> None:
        self.p = checks.fraction("Dropout: p", p)

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Return ``x`` with elements dropped; ``x`` itself in evaluation."""
        context = call.context()
        if not call.training or self.p == 0 or x.size == 0:
            return x, context
        if call.index is None or len(call.index) != x.shape[0]:
            raise InputError(
                "Dropout: the call lacks the samples' positions in the global batch",
                got="none" if call.index is None else f"{len(call.index)} positions",
                expected=f"{x.shape[0]} positions",
                remedy="set Batch.index",
            )
        words = call.key.bits(call.index, self._elements(x, call)).reshape(x.shape)
        context["mask"] = mask = context.take(x.shape, x.dtype)
        call.xp.greater_equal(words, np.uint32(self.p * 2.0**32), out=mask)
        mask *= 1.0 / (1.0 - self.p)
        y = context.take(x.shape, x.dtype)
        call.xp.multiply(x, mask, out=y)
        return y, context

    def _elements(self, x: Array, call: Call) -> tuple[int, int]:
        """Return which elements of a sample these are, first and last plus one."""
        return 0, prod(x.shape[1:])

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Return ``dy`` with the same elements dropped."""
        if "mask" not in context:
            return dy
        dx = context.take(dy.shape, dy.dtype)
        call.xp.multiply(dy, context["mask"], out=dx)
        return dx
