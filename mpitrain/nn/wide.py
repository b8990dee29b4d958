"""Layers that compute in float32 whatever comes in: `@in_float32` before a class is all that it takes.

Norms, softmax and exponentials lose too much in 16 bits, or overflow.  Their layers are written for any dtype; where a
pass is in 16 bits, what goes in is made float32, and what comes out is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from mpitrain._typing import Array, DType, Tree
from mpitrain.arrays.dtypes import is_half
from mpitrain.nn.layer import Call, Context, Layer

_FLOAT32: DType = np.dtype(np.float32)
_Forward = Callable[[Any, Tree, Array, Call], tuple[Array, Context]]
_Input = Callable[[Any, Tree, Context, Array, Call], Array]
_Weight = Callable[[Any, Tree, Context, Array, Call], None]
_L = TypeVar("_L", bound=type[Layer])


def in_float32(layer: _L) -> _L:
    """Let a class of layers compute passes over 16-bit floats in float32; all others as they are.

    Notes
    -----
    Parameters are made float32 too, and gradients are added in float32.  Memory: the float32 copies of input, output
    and their gradients, kept as long as the pass; time: what copying them takes.
    """
    layer.forward = _forward(layer.forward)  # type: ignore[assignment, method-assign]
    layer.backward_input = _backward_input(layer.backward_input)  # type: ignore[assignment, method-assign]
    layer.backward_weight = _backward_weight(layer.backward_weight)  # type: ignore[assignment, method-assign]
    layer.computes_in_float32 = True
    return layer


def copied(x: Array, dtype: DType, context: Context) -> Array:
    """Return a copy of ``x`` in another dtype, in memory of the context."""
    copy = context.take(x.shape, dtype)
    copy[...] = x
    return copy


def _forward(forward: _Forward) -> _Forward:
    @wraps(forward)
    def wide(self: Any, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        if not is_half(x.dtype):
            return forward(self, params, x, call)
        context = call.context()
        y, inner = forward(self, _wide_params(params, context), copied(x, _FLOAT32, context), call)
        context.children.append(inner)
        return copied(y, x.dtype, context), context

    return wide


def _backward_input(backward_input: _Input) -> _Input:
    @wraps(backward_input)
    def wide(self: Any, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        if not is_half(dy.dtype):
            return backward_input(self, params, context, dy, call)
        params = _wide_params(params, context)
        dx = backward_input(self, params, context.children[0], _wide_gradient(context, dy), call)
        return copied(dx, dy.dtype, context)

    return wide


def _backward_weight(backward_weight: _Weight) -> _Weight:
    @wraps(backward_weight)
    def wide(self: Any, grads: Tree, context: Context, dy: Array, call: Call) -> None:
        if not is_half(dy.dtype):
            return backward_weight(self, grads, context, dy, call)
        return backward_weight(self, grads, context.children[0], _wide_gradient(context, dy), call)

    return wide


def _wide_params(params: Tree, context: Context) -> Mapping[str, Array]:
    return {name: copied(params[name], _FLOAT32, context) for name in params}


def _wide_gradient(context: Context, dy: Array) -> Array:
    """Return the output's gradient in float32, copied once for both backward passes."""
    if "dy" not in context:
        context["dy"] = copied(dy, _FLOAT32, context)
    found: Array = context["dy"]
    return found
