"""What the units of a network take to train on a microbatch, timed on this machine.

Each unit is timed as a stage would compute it.  It knows no other rank: who cuts by times agrees on them first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from mpitrain._typing import Array, Shape, Tree
from mpitrain.arrays import Batch, FlatBuffer, Key
from mpitrain.nn import Context, Network, Sequential
from mpitrain.nn.cutting import units
from mpitrain.parallel.pipeline.costs import below

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


def measured(
    network: Network, batch: Batch, repeats: int = 5, *, only: Sequence[int] | None = None, dtype: Any = None
) -> list[UnitTimes]:
    """Return the shortest times that each unit took to train on a batch, one microbatch's.

    Parameters
    ----------
    network : Network
        Whose layer is cut, see `mpitrain.nn.cutting.units`.
    batch : Batch
        A microbatch, of one sample at least.
    repeats : int
        How often it is measured, after once that does not count.
    only : sequence of int, optional
        Numbers of the units to measure, ascending; None: all.  Their parameters, gradients and activations alone take
        memory: what other units would hand them is made up.
    dtype : dtype, optional
        In which the passes compute; None: the network's.

    Returns
    -------
    list of UnitTimes
        Of each of ``only``.

    Notes
    -----
    Times differ between ranks: who cuts by them gives all ranks the same.  The loss counts for the last unit; no unit
    computes a gradient that only layers without parameters in front of it would take.  Collective over the ranks that
    divide the model's tensors, if any do, with the same ``only``.
    """
    bench = _Bench(network, batch, range(len(units(network.layer))) if only is None else only, dtype)
    rounds = [bench.round() for _ in range(1 + repeats)][1:]
    return [UnitTimes(*(min(times) for times in zip(*unit, strict=True))) for unit in zip(*rounds, strict=True)]


@dataclass(frozen=True)
class _Unit:
    """A unit as a stage of its own, and its part of parameters and gradients."""

    number: int
    stage: Sequential
    params: Tree
    grads: Tree


class _Bench:
    """Units in memory, and what those that are not there would hand them."""

    def __init__(self, network: Network, batch: Batch, only: Sequence[int], dtype: Any) -> None:
        row, layout = units(network.layer), network.layout
        prefixes = tuple(f"{path}." if path else "" for path, _ in (row[number] for number in only))
        names = (*(segment.name for segment in layout), *layout.ties)
        layout = layout.select(name for name in names if name.startswith(prefixes))
        params, grads = FlatBuffer(layout.astype(dtype or layout.dtype)), FlatBuffer(layout)
        network.initialise(params, Key(0))
        self._network, self._batch = network, network.prepared(batch, params)
        self._call = network.surroundings(params, self._batch, training=True)
        self._units = [
            _Unit(n, Sequential(row[n][1]), *({"0": below(each.tree, row[n][0])} for each in (params, grads)))
            for n in only
        ]
        self._first_trained = next((n for n, (_, layer) in enumerate(row) if layer.parameters()), len(row))
        self._last = len(row) - 1
        self._inputs, self._gradients = _made_up(network, self._batch, only, params.layout.dtype)

    def round(self) -> list[tuple[float, float, float]]:
        """Take a training pass; return the times of forward, backward input and backward weight of each unit."""
        passes, y = list[tuple[_Unit, Context, float]](), self._batch.inputs
        for unit in self._units:
            x = self._inputs.get(unit.number, y)
            (y, context), forward_s = _timed(partial(unit.stage.forward, unit.params, x, self._call))
            passes.append((unit, context, forward_s))
        dy, loss_s, held = self._loss(y)
        found = list[tuple[float, float, float]]()
        for unit, context, forward_s in reversed(passes):
            dy, input_s, weight_s = self._backward(unit, context, self._gradients.get(unit.number, dy))
            found.append((forward_s, input_s + (loss_s if unit.number == self._last else 0.0), weight_s))
        for each in (*held, *(context for _, context, _ in passes)):
            each.release()
        return found[::-1]

    def _loss(self, outputs: Array) -> tuple[Array | None, float, list[Context]]:
        """Return the gradient of the last unit's outputs, if it is there, what it took, and what holds it."""
        if self._units[-1].number != self._last:
            return None, 0.0, []
        (_, dy, context), seconds = _timed(partial(self._network.compared, outputs, self._batch))
        return dy, seconds, [context]

    def _backward(self, unit: _Unit, context: Context, dy: Array | None) -> tuple[Array | None, float, float]:
        """Return the gradient of a unit's input, and what this and those of its weights took."""
        if unit.number < self._first_trained:
            return None, 0.0, 0.0
        assert dy is not None
        turn: Callable[..., Array | None] = unit.stage.backward_input
        if unit.number == self._first_trained:
            turn = unit.stage.backward_within
        dx, input_s = _timed(partial(turn, unit.params, context, dy, self._call))
        _, weight_s = _timed(partial(unit.stage.backward_weight, unit.grads, context, dy, self._call))
        return dx, input_s, weight_s


def _made_up(
    network: Network, batch: Batch, only: Sequence[int], dtype: Any
) -> tuple[dict[int, Array], dict[int, Array]]:
    """Return inputs of units behind one that is not there, and gradients of the outputs of those in front of one."""
    shapes, rng = _shapes(network, batch, dtype), np.random.default_rng(0)

    def draw(number: int) -> Array:
        return rng.standard_normal((len(batch), *shapes[number])).astype(dtype)

    inputs = {number: draw(number) for number in only if number > 0 and number - 1 not in only}
    gradients = {number: draw(number + 1) for number in only if number + 2 < len(shapes) and number + 1 not in only}
    return inputs, gradients


def _shapes(network: Network, batch: Batch, dtype: Any) -> list[Shape]:
    """Return the shape of a sample in front of each unit, and behind the last, found with a batch of none."""
    params = FlatBuffer(network.layout.astype(dtype))  # never touched, and so not backed by memory
    empty = network.prepared(batch.part(slice(0)), params)
    call, x, found = network.surroundings(params, empty), empty.inputs, [tuple(batch.inputs.shape[1:])]
    for path, layer in units(network.layer):
        x, _ = layer.forward(below(params.tree, path), x, call)
        found.append(tuple(x.shape[1:]))
    return found


def _timed(work: Callable[[], _T]) -> tuple[_T, float]:
    start = perf_counter()
    return work(), perf_counter() - start
