"""Adam, and AdamW with decoupled weight decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mpitrain._options import EPSILON, FRACTION, NON_NEGATIVE, Pair, option
from mpitrain._typing import Array
from mpitrain.arrays import namespace
from mpitrain.optim.elementwise import Decay, Elementwise
from mpitrain.optim.kernel import AdamSettings, adam
from mpitrain.optim.terms import Terms


@dataclass(frozen=True, kw_only=True)
class Adam(Elementwise):
    """Adam: ``m`` and ``v`` follow g and g²; ``p -= lr * m̂ / (√v̂ + eps)`` with both corrected for their zero start.

    Parameters
    ----------
    betas : (float, float)
        Shares of ``m`` and of ``v`` that are kept, in [0, 1).
    eps : float
        Keeps the division finite.
    weight_decay : float
        L2 coefficient on group ``decay``.

    Notes
    -----
    Source: Kingma, Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1 in the cheaper order that
    its section 2 gives: the corrections are folded into the learning rate and eps.
    """

    name: ClassVar[str] = "adam"
    slots: ClassVar[tuple[str, ...]] = ("m", "v")

    betas: tuple[float, float] = option(Pair(FRACTION), (0.9, 0.999))
    eps: float = option(EPSILON, 1e-8)

    def _step(self, p: Array, g: Array, slots: Sequence[Array], lr: float, step: int, work: Array) -> None:
        m, v = slots
        self._follow(m, v, g, work)
        work *= lr * self._direction(m, v, step, work)
        p -= work

    def _compiled(self, p: Array, terms: Terms, slots: Sequence[Array], lr: float, step: int, decay: Decay) -> bool:
        m, v = slots
        beta1, beta2 = self.betas
        eps, rate = self._corrected(step)
        settings = AdamSettings(decay.penalty, decay.shrink, 1.0 - beta1, beta2, 1.0 - beta2, eps, lr * rate)
        return adam(p, terms, m, v, settings)

    def _corrected(self, step: int) -> tuple[float, float]:
        """Return eps and the learning rate's factor, both corrected for the moments' zero start."""
        beta1, beta2 = self.betas
        root = math.sqrt(1.0 - beta2**step)
        return self.eps * root, root / (1.0 - beta1**step)

    def _follow(self, m: Array, v: Array, g: Array, work: Array) -> None:
        """Move the moments towards g and g²."""
        xp = namespace(g)
        beta1, beta2 = self.betas
        xp.subtract(g, m, out=work)
        work *= 1.0 - beta1
        m += work
        xp.multiply(g, g, out=work)
        work *= 1.0 - beta2
        v *= beta2
        v += work

    def _direction(self, m: Array, v: Array, step: int, out: Array) -> float:
        """Write ``m̂ / (√v̂ + eps)`` to ``out``, but for the factor that is returned."""
        xp = namespace(m)
        eps, rate = self._corrected(step)
        xp.sqrt(v, out=out)
        out += eps
        xp.divide(m, out, out=out)
        return rate


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay: ``p -= lr * weight_decay * p`` beside Adam's step.

    Parameters
    ----------
    betas, eps
        As in `Adam`.
    weight_decay : float
        Coefficient on group ``decay``; it does not pass through the moments.

    Notes
    -----
    Source: Loshchilov, Hutter, "Decoupled weight decay regularization", ICLR 2019, with the decay multiplied by the
    learning rate (as in PyTorch).
    """

    name: ClassVar[str] = "adamw"

    weight_decay: float = option(NON_NEGATIVE, 0.01)

    def _decay(self, lr: float) -> Decay:
        """Return decay of the parameters themselves."""
        return Decay(shrink=1.0 - lr * self.weight_decay)
