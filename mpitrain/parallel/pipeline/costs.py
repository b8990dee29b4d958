"""What the units of a network cost, counted from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from mpitrain._typing import Array, Shape, Tree
from mpitrain.arrays import FlatBuffer
from mpitrain.nn import Call, CausalAttention, Layer, Network, Recompute, Residual, Sequential
from mpitrain.nn.cutting import units

_PER_VALUE = 8
"""A value that passes through memory costs about as much as so many multiplications of a matrix product."""


def counted(network: Network, sample_shape: Shape) -> list[float]:
    """Return the work of each unit for one sample, forward, in multiplications.

    Parameters
    ----------
    network : Network
        Whose layer is cut, see `mpitrain.nn.cutting.units`.
    sample_shape : tuple of int
        Of one input.

    Notes
    -----
    Counted are the products with matrices of weights and of attention, and for every layer the values that it writes.
    Backward costs about twice as much as forward in each layer, and so hardly moves the cuts.
    """
    params = FlatBuffer(network.layout)  # never touched, and so not backed by memory
    dtype = np.dtype(np.int64) if network.layer.takes_indices else network.layout.dtype
    x: Array = np.empty((0, *sample_shape), dtype)
    found = []
    for path, layer in units(network.layer):
        work, x = _count(layer, below(params.tree, path), x, Call())
        found.append(work)
    return found


def _count(layer: Layer, params: Tree, x: Array, call: Call) -> tuple[float, Array]:
    """Return the work of a layer for one sample, and its output for the empty batch ``x``."""
    if isinstance(layer, Sequential):
        total = 0.0
        for name, child in layer.children:
            work, x = _count(child, params.get(name, {}), x, call)
            total += work
        return total, x
    if isinstance(layer, Recompute):
        return _count(layer.layer, params, x, call)
    if isinstance(layer, Residual):
        branches = [_count(child, params.get(name, {}), x, call) for name, child in layer.children]
        y = branches[0][1]
        return sum(work for work, _ in branches) + _PER_VALUE * prod(y.shape[1:]), y
    y, _ = layer.forward(params, x, call)
    return _multiplications(layer, x, y) + _PER_VALUE * prod(y.shape[1:]), y


def _multiplications(layer: Layer, x: Array, y: Array) -> float:
    """Return how often a layer that is not made of others multiplies, for one sample, in matrix products."""
    if isinstance(layer, CausalAttention):
        return float(y.shape[1] * prod(y.shape[1:]))  # two products over, on average, half of the keys
    if layer.takes_indices:
        return 0.0
    matrices = [each for each in layer.parameters() if len(each.shape) > 1 and each.group == "decay"]
    return float(sum(prod(each.shape) for each in matrices) * prod(y.shape[1:-1]))


def below(tree: Mapping[str, Any], path: str) -> Tree:
    """Return the part of a nested dictionary below a dotted path, empty if there is none."""
    for name in filter(None, path.split(".")):
        tree = tree.get(name, {})
    return tree
