"""What every layer and every loss must pass: gradients against finite differences, and the manners of the contract.

Whoever writes a layer or loss calls these from a test.  Failures are `AssertionError`, as in `numpy.testing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays import Batch, FlatBuffer, Key
from mpitrain.nn.layer import Call, Context, Layer
from mpitrain.nn.layout import layout_of
from mpitrain.nn.loss import Loss
from mpitrain.nn.pool import Pool


def check_layer(
    layer: Layer, x: Array, *, training: bool = True, step: float = 1e-6, tolerance: float = 1e-6, seed: int = 0
) -> None:
    """Check a layer in float64.

    Checked are: gradients of input and parameters against central differences; that gradients are added to what is
    there; that two passes may be in flight at once; that a repeated pass gives the same bits and allocates nothing;
    that ``backward`` agrees with its two halves; that inputs and parameters are left alone; and an empty batch.

    Parameters
    ----------
    layer : Layer
        The layer.
    x : array, shape (n, …)
        Input, float64 (or integers where the layer takes indices), away from kinks such as ReLU's 0; a few dozen
        elements, for each costs two forward passes.
    training : bool
        Mode of the passes.
    step : float
        Half the distance of the central differences.
    tolerance : float
        Largest difference of a gradient, relative to the largest element or 1.
    seed : int
        Of parameters and output gradients.

    Raises
    ------
    AssertionError
        Something differs; the message says what.
    """
    trial = _Trial.of(layer, x, training, seed)
    with _left_alone(x, "the input"), _left_alone(trial.params.flat, "the parameters"):
        first = trial.run(x)
        _check_manners(trial, x, first)
        _check_empty(trial, x)
    if not layer.takes_indices:
        numerical = _differences(lambda: trial.objective(x), x, step)
        _compare("input", first.dx, numerical, tolerance)
    for segment in trial.params.layout.segments:
        if segment.group != "statistics":
            view = trial.params.views[segment.name]
            numerical = _differences(lambda: trial.objective(x), view, step)
            _compare(segment.name, first.grads[segment.name], numerical, tolerance)


def check_loss(loss: Loss, outputs: Array, batch: Batch, *, step: float = 1e-6, tolerance: float = 1e-6) -> None:
    """Check a loss in float64: its gradient, two contexts in flight, a repeated pass, and an empty batch.

    Parameters
    ----------
    loss : Loss
        The loss.
    outputs : array of float64, shape (n, …)
        Outputs of a model.
    batch : Batch
        Targets and weights; its inputs are not looked at.
    step, tolerance : float
        As in `check_layer`.

    Raises
    ------
    AssertionError
        Something differs; the message says what.
    """
    pool = Pool()
    value, context = loss.forward(outputs, batch, pool)
    gradient = loss.backward(context).copy()
    with _left_alone(outputs, "the outputs"):
        _, other = loss.forward(-outputs, batch, pool)
        loss.backward(other)
        _same("the gradient after another pass", loss.backward(context), gradient)
        context.release()
        other.release()
        misses = pool.misses
        again, context = loss.forward(outputs, batch, pool)
        _same("a repeated pass", np.float64(again), np.float64(value))
        _expect(pool.misses == misses, "a repeated pass allocates")
        context.release()
    none = Batch(batch.inputs[:0], batch.targets[:0], batch.index[:0])
    empty, context = loss.forward(outputs[:0], none, pool)
    _expect(empty == 0.0 and loss.count(none) == 0.0, "an empty batch has a loss or a count")
    _expect(loss.backward(context).shape == outputs[:0].shape, "an empty batch's gradient has the wrong shape")
    numerical = _differences(lambda: loss.forward(outputs, batch, pool)[0], outputs, step)
    _compare("output", gradient, numerical, tolerance)


@dataclass(frozen=True)
class _Pass:
    """Copies of what one pass gave."""

    y: Array
    dx: Array
    grads: dict[str, Array]


@dataclass(frozen=True)
class _Trial:
    """A layer with parameters, and one output gradient for all passes."""

    layer: Layer
    params: FlatBuffer
    dy: Array
    call: Call

    @classmethod
    def of(cls, layer: Layer, x: Array, training: bool, seed: int) -> _Trial:
        random, params = np.random.default_rng(seed), FlatBuffer(layout_of(layer, np.float64))
        for parameter in layer.parameters():  # off zero and one, or a forgotten bias or scale would not show
            values = parameter.initialiser(Key(seed).child(parameter.name), params.layout[parameter.name])
            params.views[parameter.name][...] = values + 0.3 * random.random(parameter.shape)
        call = Call(np, Pool(), training, Key(seed), np.arange(len(x)), float(len(x)))
        y, context = layer.forward(params.tree, x, call)
        dy = random.standard_normal(y.shape)
        context.release()
        return cls(layer, params, dy, call)

    def objective(self, x: Array) -> float:
        """Return Σ y · dy, whose gradient the backward passes give."""
        y, context = self.layer.forward(self.params.tree, x, self.call)
        value = float((y * self.dy).sum())
        context.release()
        return value

    def forward(self, x: Array) -> tuple[Array, Context]:
        return self.layer.forward(self.params.tree, x, self.call)

    def finish(self, y: Array, context: Context, *, fused: bool = False, start: float = 0.0) -> _Pass:
        """Run the backward passes and copy what they give."""
        grads = FlatBuffer(self.params.layout)
        grads.flat[...] = start
        y = y.copy()
        if fused:
            dx = self.layer.backward(self.params.tree, grads.tree, context, self.dy, self.call)
            assert dx is not None
        else:
            dx = self.layer.backward_input(self.params.tree, context, self.dy, self.call)
            self.layer.backward_weight(grads.tree, context, self.dy, self.call)
        found = _Pass(y, dx.copy(), grads.views)
        context.release()
        return found

    def run(self, x: Array, *, fused: bool = False, start: float = 0.0) -> _Pass:
        return self.finish(*self.forward(x), fused=fused, start=start)

    def weights_only(self, x: Array) -> dict[str, Array]:
        """Return the gradients from a backward pass that is not asked for the input's."""
        grads = FlatBuffer(self.params.layout)
        _, context = self.forward(x)
        self.layer.backward(self.params.tree, grads.tree, context, self.dy, self.call, want_dx=False)
        context.release()
        return grads.views


def _check_manners(trial: _Trial, x: Array, first: _Pass) -> None:
    """Check everything but the values of the gradients."""
    misses = trial.call.pool.misses
    _same_pass("a repeated pass", trial.run(x), first)
    _expect(trial.call.pool.misses == misses, "a repeated pass allocates")
    _same_pass("backward in one call", trial.run(x, fused=True), first)
    for name, gradient in trial.weights_only(x).items():
        _same(f"backward without the input gradient ({name})", gradient, first.grads[name])
    added = trial.run(x, start=1.0)
    for name, gradient in first.grads.items():
        _compare(f"{name}, added to ones,", added.grads[name] - 1.0, gradient, 1e-12)
    other = np.ascontiguousarray(x[::-1])
    alone = trial.run(other)
    passes = trial.forward(x), trial.forward(other)
    _same_pass("the first of two passes in flight", trial.finish(*passes[0]), first)
    _same_pass("the second of two passes in flight", trial.finish(*passes[1]), alone)


def _check_empty(trial: _Trial, x: Array) -> None:
    """Check that a rank without samples gets empty arrays and adds nothing."""
    call = Call(np, Pool(), trial.call.training, trial.call.key, np.arange(0), 0.0)
    found = _Trial(trial.layer, trial.params, trial.dy[:0], call).run(x[:0])
    _expect(found.y.shape == trial.dy[:0].shape, f"an empty batch gives an output of shape {found.y.shape}")
    _expect(found.dx.shape == x[:0].shape, f"an empty batch gives an input gradient of shape {found.dx.shape}")
    for name, gradient in found.grads.items():
        _expect(not gradient.any(), f"an empty batch changes the gradient of {name}")


def _differences(objective: Callable[[], float], array: Array, step: float) -> Array:
    """Return the central differences of ``objective`` with respect to each element of ``array``."""
    slopes = np.empty(array.shape)
    for position in np.ndindex(array.shape):
        kept = array[position]
        array[position] = kept + step
        above = objective()
        array[position] = kept - step
        slopes[position] = (above - objective()) / (2.0 * step)
        array[position] = kept
    return slopes


def _compare(name: str, found: Array, expected: Array, tolerance: float) -> None:
    if found.size == 0:
        return
    worst = float(np.abs(found - expected).max())
    scale = max(1.0, float(np.abs(expected).max()))
    _expect(worst <= tolerance * scale, f"gradient of {name} is off by {worst:.3g}, at most {tolerance * scale:.3g}")


def _same(what: str, found: Array | np.float64, expected: Array | np.float64) -> None:
    _expect(np.array_equal(found, expected), f"{what} gives other numbers")


def _same_pass(what: str, found: _Pass, expected: _Pass) -> None:
    _same(f"{what} (output)", found.y, expected.y)
    _same(f"{what} (input gradient)", found.dx, expected.dx)
    for name, gradient in expected.grads.items():
        _same(f"{what} ({name})", found.grads[name], gradient)


@contextmanager
def _left_alone(array: Array, what: str) -> Iterator[None]:
    kept = array.copy()
    yield
    _same(f"a pass that changes {what}", array, kept)


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)
