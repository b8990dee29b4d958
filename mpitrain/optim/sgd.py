"""Gradient descent and its heavy-ball forms, with the momentum conventions of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mpitrain._options import FRACTION, Interval, option
from mpitrain._typing import Array
from mpitrain.arrays import namespace
from mpitrain.optim.elementwise import Elementwise


@dataclass(frozen=True, kw_only=True)
class SGD(Elementwise):
    """Stochastic gradient descent: ``p -= lr * g``."""

    name: ClassVar[str] = "sgd"

    def _step(self, p: Array, g: Array, slots: Sequence[Array], lr: float, step: int, work: Array) -> None:
        namespace(p).multiply(g, lr, out=work)
        p -= work


@dataclass(frozen=True, kw_only=True)
class GradientDescent(SGD):
    """Gradient descent: the rule of `SGD`, each step on the whole training set."""

    name: ClassVar[str] = "gd"
    full_batch: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Momentum(Elementwise):
    """Heavy ball: ``b = momentum * b + g; p -= lr * b``.

    Parameters
    ----------
    momentum : float
        Share of the velocity that is kept, in [0, 1).
    weight_decay : float
        L2 coefficient on group ``decay``.

    Notes
    -----
    Source: Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.  The learning rate
    multiplies the velocity when it is applied, not when it is gathered (as in PyTorch).
    """

    name: ClassVar[str] = "momentum"
    slots: ClassVar[tuple[str, ...]] = ("velocity",)

    momentum: float = option(FRACTION, 0.9)

    def _step(self, p: Array, g: Array, slots: Sequence[Array], lr: float, step: int, work: Array) -> None:
        (velocity,) = slots
        velocity *= self.momentum
        velocity += g
        namespace(p).multiply(velocity, lr, out=work)
        p -= work


@dataclass(frozen=True, kw_only=True)
class Nesterov(Elementwise):
    """Nesterov's momentum: ``b = momentum * b + g; p -= lr * (g + momentum * b)``.

    Parameters
    ----------
    momentum : float
        Share of the velocity that is kept, in (0, 1).
    weight_decay : float
        L2 coefficient on group ``decay``.

    Notes
    -----
    Source: Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep learning",
    ICML 2013, in the form that is evaluated at the look-ahead point (as in PyTorch).
    """

    name: ClassVar[str] = "nesterov"
    slots: ClassVar[tuple[str, ...]] = ("velocity",)

    momentum: float = option(Interval(0.0, 1.0, "()"), 0.9)

    def _step(self, p: Array, g: Array, slots: Sequence[Array], lr: float, step: int, work: Array) -> None:
        (velocity,) = slots
        velocity *= self.momentum
        velocity += g
        namespace(p).multiply(velocity, self.momentum, out=work)
        work += g
        work *= lr
        p -= work
