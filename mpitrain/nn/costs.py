"""What a training step of a layer costs, counted from shapes alone: products in floating-point operations, memory.

Counted are the matrix products, as papers count them; what is done element by element takes time but is not counted,
and what is computed again in the backward pass counts once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import singledispatch
from math import prod

from mpitrain._errors import InputError
from mpitrain._typing import DType, Shape
from mpitrain.arrays.dtypes import is_half
from mpitrain.nn.activations import Activation
from mpitrain.nn.attention import CausalAttention, query_blocks
from mpitrain.nn.batchnorm import BatchNorm
from mpitrain.nn.containers import Residual, Sequential
from mpitrain.nn.conv import Conv2d
from mpitrain.nn.dropout import Dropout
from mpitrain.nn.embedding import Embedding
from mpitrain.nn.flatten import Flatten
from mpitrain.nn.layer import Layer
from mpitrain.nn.layernorm import LayerNorm
from mpitrain.nn.linear import Linear
from mpitrain.nn.pooling import AvgPool2d, MaxPool2d
from mpitrain.nn.positions import PositionEmbedding
from mpitrain.nn.recompute import Recompute
from mpitrain.nn.unembedding import Unembedding
from mpitrain.nn.windows import output_size


@dataclass(frozen=True)
class Cost:
    """What one pass forward and one backward over a batch take.

    Parameters
    ----------
    shape : tuple of int
        Of the output.
    forward, backward_input, backward_weight : int
        Floating-point operations of the matrix products of each pass: 2·m·n·k for (m, k) times (k, n).
    kept : int
        Elements of all arrays that the forward pass leaves for the backward pass, inputs not included.
    """

    shape: Shape
    forward: int = 0
    backward_input: int = 0
    backward_weight: int = 0
    kept: int = 0

    def then(self, after: Cost) -> Cost:
        """Return the cost of this and of what comes after it."""
        return Cost(
            after.shape,
            self.forward + after.forward,
            self.backward_input + after.backward_input,
            self.backward_weight + after.backward_weight,
            self.kept + after.kept,
        )

    @property
    def flops(self) -> int:
        """Floating-point operations of all three passes."""
        return self.forward + self.backward_input + self.backward_weight


@singledispatch
def cost(layer: Layer, shape: Shape) -> Cost:
    """Return what a layer costs for an input of a shape.

    Parameters
    ----------
    layer : Layer
        One of those below; another layer is one more function here.
    shape : tuple of int
        Of the input, (n, …).

    Raises
    ------
    InputError
        Nobody has said what this layer costs.
    """
    raise InputError("nobody has said what this layer costs", operation="cost", got=type(layer).__name__)


def kept_bytes(layer: Layer, shape: Shape, dtype: DType) -> int:
    """Return the bytes that a forward pass leaves for the backward pass, inputs not included.

    Parameters
    ----------
    layer, shape
        As for `cost`.
    dtype : dtype
        Of the passes.  In 16 bits, layers that compute in float32 keep copies in float32 of what they read, input and
        parameters; all that they compute, in float32; and their output in 16 bits.

    Raises
    ------
    InputError
        As for `cost`.
    """
    return _kept_in_half(layer, shape) if is_half(dtype) else cost(layer, shape).kept * dtype.itemsize


@singledispatch
def _kept_in_half(layer: Layer, shape: Shape) -> int:
    found = cost(layer, shape)
    if not layer.computes_in_float32:
        return 2 * found.kept
    read = prod(shape) + sum(each.segment().size for each in layer.parameters())
    return 4 * (read + found.kept) + 2 * prod(found.shape)


@_kept_in_half.register
def _(layer: Sequential, shape: Shape) -> int:
    kept = 0
    for number, each in enumerate(layer.layers):
        kept += 0 if number - 1 in layer.applied else _kept_in_half(each, shape)
        shape = cost(each, shape).shape
    return kept


@_kept_in_half.register
def _(layer: Residual, shape: Shape) -> int:
    return sum(_kept_in_half(each, shape) for _, each in layer.children) + 2 * prod(cost(layer, shape).shape)


@_kept_in_half.register
def _(layer: Recompute, shape: Shape) -> int:
    return 2 * cost(layer, shape).kept  # its output alone, whatever it computes in


def training_flops(layer: Layer, shape: Shape) -> int:
    """Return the operations of a training step, in which nobody asks for the gradient of the input."""
    return cost(layer, shape).flops - _unasked(layer, shape)


def _unasked(layer: Layer, shape: Shape) -> int:
    """Return the operations of the input gradient of the first layer that has parameters, and of what precedes it."""
    if not isinstance(layer, Sequential):
        return cost(layer, shape).backward_input
    unasked = 0
    for each in layer.layers:
        if each.parameters():
            return unasked + _unasked(each, shape)
        found = cost(each, shape)
        unasked, shape = unasked + found.backward_input, found.shape
    return unasked


@cost.register
def _(layer: Sequential, shape: Shape) -> Cost:
    total = Cost(shape)
    for number, each in enumerate(layer.layers):
        found = cost(each, total.shape)
        total = total.then(replace(found, kept=0) if number - 1 in layer.applied else found)
    return total


@cost.register
def _(layer: Residual, shape: Shape) -> Cost:
    inner, shortcut = (cost(each, shape) for _, each in layer.children)
    return shortcut.then(inner).then(Cost(inner.shape, kept=prod(inner.shape)))


@cost.register
def _(layer: Linear, shape: Shape) -> Cost:
    return _product(shape, layer.inputs, layer.outputs)


@cost.register
def _(layer: Unembedding, shape: Shape) -> Cost:
    return _product(shape, layer.features, layer.count)


def _product(shape: Shape, inputs: int, outputs: int) -> Cost:
    rows = prod(shape[:-1])
    each = 2 * rows * inputs * outputs
    return Cost((*shape[:-1], outputs), each, each, each, kept=rows * outputs)


@cost.register
def _(layer: Conv2d, shape: Shape) -> Cost:
    n, height, width, channels = shape
    top, left = layer.padding
    padded = (n, height + 2 * top, width + 2 * left, channels)
    pixels = n * prod(output_size(padded, layer.kernel_size, layer.stride))
    each = 2 * pixels * layer.patch_size * layer.out_channels
    out = (n, *output_size(padded, layer.kernel_size, layer.stride), layer.out_channels)
    return Cost(out, each, each, each, kept=prod(out))


@cost.register
def _(layer: CausalAttention, shape: Shape) -> Cost:
    n, length, columns = shape
    pairs, width = length * (length + 1) // 2, columns // 3  # of a query and a key that it may see
    product = 2 * n * pairs * width  # of all heads
    scores = sum((stop - start) * stop for start, stop in query_blocks(length))
    kept = n * length * width + n * layer.heads * (length + scores)  # outputs; totals, weights
    return Cost((n, length, width), 2 * product, 4 * product, 0, kept)


@cost.register
def _(layer: LayerNorm, shape: Shape) -> Cost:
    return Cost(shape, kept=2 * prod(shape) + prod(shape[:-1]))


@cost.register
def _(layer: BatchNorm, shape: Shape) -> Cost:
    return Cost(shape, kept=2 * prod(shape))


@cost.register
def _(layer: Dropout, shape: Shape) -> Cost:
    return Cost(shape, kept=2 * prod(shape) if layer.p else 0)


@cost.register
def _(layer: Recompute, shape: Shape) -> Cost:
    once = cost(layer.layer, shape)
    return replace(once, kept=prod(once.shape))


@cost.register
def _(layer: MaxPool2d | AvgPool2d, shape: Shape) -> Cost:
    out = (shape[0], *output_size(shape, layer.kernel_size, layer.stride), shape[3])
    return Cost(out, kept=prod(out))


@cost.register
def _(layer: Embedding, shape: Shape) -> Cost:
    return Cost((*shape, layer.features), kept=prod(shape) * layer.features)


@cost.register
def _(layer: Activation | PositionEmbedding, shape: Shape) -> Cost:
    return Cost(shape, kept=prod(shape))


@cost.register
def _(layer: Flatten, shape: Shape) -> Cost:
    return Cost((shape[0], prod(shape[1:])))
