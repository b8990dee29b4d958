"""AdaGrad and RMSprop: each element's rate is divided by the size of its past gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mpitrain._options import EPSILON, FRACTION, option
from mpitrain._typing import Array
from mpitrain.arrays import namespace
from mpitrain.optim.elementwise import Elementwise


@dataclass(frozen=True, kw_only=True)
class AdaGrad(Elementwise):
    """AdaGrad: ``s += g²; p -= lr * g / (√s + eps)``.

    Parameters
    ----------
    eps : float
        Keeps the division finite.
    weight_decay : float
        L2 coefficient on group ``decay``.

    Notes
    -----
    Source: Duchi, Hazan, Singer, "Adaptive subgradient methods", JMLR 12, 2011, the diagonal form.
    """

    name: ClassVar[str] = "adagrad"
    slots: ClassVar[tuple[str, ...]] = ("squares",)

    eps: float = option(EPSILON, 1e-10)

    def _step(self, p: Array, g: Array, slots: Sequence[Array], lr: float, step: int, work: Array) -> None:
        (squares,) = slots
        namespace(p).multiply(g, g, out=work)
        squares += work
        descend_normalised(p, g, squares, lr, self.eps, work)


@dataclass(frozen=True, kw_only=True)
class RMSprop(Elementwise):
    """RMSprop: ``s = alpha * s + (1 - alpha) * g²; p -= lr * g / (√s + eps)``.

    Parameters
    ----------
    alpha : float
        Share of the mean square that is kept, in [0, 1).
    eps : float
        Keeps the division finite.
    weight_decay : float
        L2 coefficient on group ``decay``.

    Notes
    -----
    Source: Tieleman, Hinton, "Neural networks for machine learning", lecture 6.5, 2012.
    """

    name: ClassVar[str] = "rmsprop"
    slots: ClassVar[tuple[str, ...]] = ("squares",)

    alpha: float = option(FRACTION, 0.99)
    eps: float = option(EPSILON, 1e-8)

    def _step(self, p: Array, g: Array, slots: Sequence[Array], lr: float, step: int, work: Array) -> None:
        (squares,) = slots
        namespace(p).multiply(g, g, out=work)
        work *= 1.0 - self.alpha
        squares *= self.alpha
        squares += work
        descend_normalised(p, g, squares, lr, self.eps, work)


def descend_normalised(p: Array, g: Array, squares: Array, lr: float, eps: float, work: Array) -> None:
    """Apply ``p -= lr * g / (√squares + eps)`` in place."""
    xp = namespace(p)
    xp.sqrt(squares, out=work)
    work += eps
    xp.divide(g, work, out=work)
    work *= lr
    p -= work
