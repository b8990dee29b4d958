"""What the units of a network cost: counted from shapes, or measured on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from mpitrain._typing import Array, Shape, Tree
from mpitrain.arrays import Batch, FlatBuffer, Key
from mpitrain.nn import Call, CausalAttention, Context, Layer, Network, Residual, Sequential
from mpitrain.nn.cutting import units

_PER_VALUE = 8
"""A value that passes through memory costs about as much as so many multiplications of a matrix product."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class UnitTimes:
    """Seconds that a unit takes for a microbatch."""

    forward_s: float
    backward_input_s: float
    backward_weight_s: float

    @property
    def total_s(self) -> float:
        """All three together."""
        return self.forward_s + self.backward_input_s + self.backward_weight_s


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
        work, x = _count(layer, _below(params.tree, path), x, Call())
        found.append(work)
    return found


def measured(network: Network, batch: Batch, repeats: int = 5) -> list[UnitTimes]:
    """Return the shortest times that each unit took to train on a batch, one microbatch's.

    Parameters
    ----------
    network : Network
        Whose layer is cut.
    batch : Batch
        A microbatch.
    repeats : int
        How often it is measured, after once that does not count.

    Notes
    -----
    Times differ between ranks: who cuts by them gives all ranks those of one.  The loss counts for the last unit.
    """
    params, grads = FlatBuffer(network.layout), FlatBuffer(network.layout)
    network.initialise(params, Key(0))
    batch = network.prepared(batch, params)
    call = Call(pool=network.pool, training=True, index=batch.index, count=network.loss.count(batch))
    rounds = [_measure(network, batch, call, params.tree, grads.tree) for _ in range(1 + repeats)][1:]
    return [UnitTimes(*(min(times) for times in zip(*unit, strict=True))) for unit in zip(*rounds, strict=True)]


def _count(layer: Layer, params: Tree, x: Array, call: Call) -> tuple[float, Array]:
    """Return the work of a layer for one sample, and its output for the empty batch ``x``."""
    if isinstance(layer, Sequential):
        total = 0.0
        for name, child in layer.children:
            work, x = _count(child, params.get(name, {}), x, call)
            total += work
        return total, x
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


def _measure(network: Network, batch: Batch, call: Call, params: Tree, grads: Tree) -> list[tuple[float, ...]]:
    """Return the times of forward, backward input and backward weight of each unit."""
    x, passes = batch.inputs, list[tuple[Layer, Tree, Tree, Context, float]]()
    for path, layer in units(network.layer):
        own = _below(params, path)
        (x, context), forward_s = _timed(lambda layer=layer, own=own, x=x: layer.forward(own, x, call))  # type: ignore[misc]
        passes.append((layer, own, _below(grads, path), context, forward_s))
    (_, loss_context), loss_s = _timed(lambda: network.loss.forward(x, batch, network.pool))
    dy, found = network.loss.backward(loss_context), list[tuple[float, ...]]()
    for layer, own, target, context, forward_s in reversed(passes):
        dx, input_s = _timed(lambda: layer.backward_input(own, context, dy, call))  # noqa: B023
        _, weight_s = _timed(lambda: layer.backward_weight(target, context, dy, call))  # noqa: B023
        found.append((forward_s, input_s + (0.0 if found else loss_s), weight_s))
        dy = dx
    for *_, context, _ in passes:
        context.release()
    loss_context.release()
    return found[::-1]


def _timed(work: Callable[[], _T]) -> tuple[_T, float]:
    start = perf_counter()
    return work(), perf_counter() - start


def _below(tree: Mapping[str, Any], path: str) -> Tree:
    """Return the part of a nested dictionary below a dotted path, empty if there is none."""
    for name in filter(None, path.split(".")):
        tree = tree.get(name, {})
    return tree
