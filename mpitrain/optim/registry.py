"""The optimizers by the names that job files use.  One more is one class and one line here."""

from __future__ import annotations

from typing import Any

from mpitrain._options import construct
from mpitrain.optim.adam import Adam, AdamW
from mpitrain.optim.adaptive import AdaGrad, RMSprop
from mpitrain.optim.elementwise import Elementwise
from mpitrain.optim.lamb import LAMB
from mpitrain.optim.sgd import SGD, GradientDescent, Momentum, Nesterov

OPTIMIZERS: dict[str, type[Elementwise]] = {
    cls.name: cls for cls in (AdaGrad, Adam, AdamW, GradientDescent, LAMB, Momentum, Nesterov, RMSprop, SGD)
}


def make_optimizer(name: str, **options: Any) -> Elementwise:
    """Return the optimizer that ``name`` stands for.

    Parameters
    ----------
    name : str
        A key of `OPTIMIZERS`.
    **options
        Its hyperparameters (not the learning rate, which is given to each update).

    Raises
    ------
    InputError
        The name or an option is unknown, or a value is not allowed.
    """
    return construct("optimizer", OPTIMIZERS, name, options)
