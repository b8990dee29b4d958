"""Activation functions: one function of each element, and its slope."""

from __future__ import annotations

from abc import abstractmethod
from math import pi, sqrt

from mpitrain._typing import Array, Tree
from mpitrain.nn import kernel
from mpitrain.nn.layer import Call, Context, Layer
from mpitrain.nn.wide import in_float32


class Activation(Layer):
    """A function of each element.  A subclass gives its value and its slope, both into memory that it is handed."""

    overwrites: bool = False
    """Whether `value` may write over ``x``, and `gradient`, which needs f(x) alone, over ``dy``.

    A subclass says so anew.
    """

    @abstractmethod
    def value(self, x: Array, y: Array, call: Call) -> None:
        """Write f(x) into ``y``."""

    @abstractmethod
    def slope(self, x: Array, y: Array, out: Array, call: Call) -> None:
        """Write f'(x) into ``out``; ``y`` is f(x)."""

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Return f(x)."""
        context = call.context()
        y = context.take(x.shape, x.dtype)
        self.value(x, y, call)
        context["x"], context["y"] = x, y
        return y, context

    def applied(self, y: Array, call: Call) -> Context:
        """Return the context of a forward pass whose output ``y`` has overwritten its input."""
        context = call.context()
        context["x"] = context["y"] = y
        return context

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Return f'(x) dy."""
        dx = context.take(dy.shape, dy.dtype)
        self.gradient(context["x"], context["y"], dy, dx, call)
        return dx

    def gradient(self, x: Array, y: Array, dy: Array, out: Array, call: Call) -> None:
        """Write f'(x) dy into ``out``."""
        self.slope(x, y, out, call)
        out *= dy


class ReLU(Activation):
    """max(x, 0); the slope at 0 is 0."""

    overwrites = True

    def value(self, x: Array, y: Array, call: Call) -> None:
        """Write max(x, 0)."""
        if not kernel.relu(x, y):
            call.xp.maximum(x, 0, out=y)

    def slope(self, x: Array, y: Array, out: Array, call: Call) -> None:
        """Write 1 where y > 0, else 0."""
        call.xp.greater(y, 0, out=out)

    def gradient(self, x: Array, y: Array, dy: Array, out: Array, call: Call) -> None:
        """Write ``dy`` where y > 0, else zeros."""
        if not kernel.relu_gradient(y, dy, out):
            call.xp.multiply(dy, call.xp.greater(y, 0), out=out)


@in_float32
class Tanh(Activation):
    """The hyperbolic tangent."""

    def value(self, x: Array, y: Array, call: Call) -> None:
        """Write tanh(x)."""
        call.xp.tanh(x, out=y)

    def slope(self, x: Array, y: Array, out: Array, call: Call) -> None:
        """Write 1 − y²."""
        call.xp.multiply(y, y, out=out)
        call.xp.subtract(1, out, out=out)


@in_float32
class Sigmoid(Activation):
    """1 / (1 + exp(−x)), without overflow and accurate in both tails."""

    def value(self, x: Array, y: Array, call: Call) -> None:
        """Write 1 / (1 + exp(−x))."""
        sigmoid(x, y, call)

    def slope(self, x: Array, y: Array, out: Array, call: Call) -> None:
        """Write y (1 − y)."""
        call.xp.subtract(1, y, out=out)
        out *= y


@in_float32
class GELU(Activation):
    """x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))): the tanh form of the Gaussian error linear unit.

    Notes
    -----
    Hendrycks, Gimpel, "Gaussian error linear units", 2016, section 2.  The exact form needs erf, which NumPy has
    not; the two differ by less than 5e-4.  It is PyTorch's ``GELU(approximate="tanh")``.
    """

    _SCALE = sqrt(2.0 / pi)
    _CUBIC = 0.044715

    def value(self, x: Array, y: Array, call: Call) -> None:
        """Write x/2 · (1 + tanh(…))."""
        if kernel.gelu(x, y):
            return
        self._tanh(x, y, call)
        y += 1
        y *= x
        y *= 0.5

    def slope(self, x: Array, y: Array, out: Array, call: Call) -> None:
        """Write (1 + tanh(…) + (1 − tanh²(…)) · x · d(…)/dx) / 2."""
        tanh, inner = call.take(x.shape, x.dtype), call.take(x.shape, x.dtype)
        self._tanh(x, tanh, call)
        call.xp.multiply(x, x, out=inner)  # x · d/dx of the argument: √(2/π) (x + 3 · 0.044715 x³)
        inner *= 3 * self._CUBIC * self._SCALE
        inner += self._SCALE
        inner *= x
        call.xp.multiply(tanh, tanh, out=out)  # ((1 − tanh²) · inner + tanh + 1) / 2
        call.xp.subtract(1, out, out=out)
        out *= inner
        out += tanh
        out += 1
        out *= 0.5
        call.give(tanh, inner)

    def gradient(self, x: Array, y: Array, dy: Array, out: Array, call: Call) -> None:
        """Write the slope times ``dy``."""
        if not kernel.gelu_gradient(x, dy, out):
            super().gradient(x, y, dy, out, call)

    def _tanh(self, x: Array, out: Array, call: Call) -> None:
        """Write tanh(√(2/π) (x + 0.044715 x³)) into ``out``."""
        call.xp.multiply(x, x, out=out)
        out *= self._CUBIC * self._SCALE
        out += self._SCALE
        out *= x
        call.xp.tanh(out, out=out)


def sigmoid(x: Array, out: Array, call: Call) -> None:
    """Write 1 / (1 + exp(−x)) into ``out`` as exp(min(x, 0)) / (1 + exp(−|x|)), in which nothing overflows."""
    xp = call.xp
    denominator = call.take(x.shape, x.dtype)
    xp.abs(x, out=denominator)
    xp.negative(denominator, out=denominator)
    xp.exp(denominator, out=denominator)
    denominator += 1
    xp.minimum(x, 0, out=out)
    xp.exp(out, out=out)
    out /= denominator
    call.give(denominator)


ACTIVATIONS: dict[str, type[Activation]] = {"gelu": GELU, "relu": ReLU, "sigmoid": Sigmoid, "tanh": Tanh}
"""By the names that job files use."""
