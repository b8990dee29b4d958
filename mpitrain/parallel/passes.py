"""A rank's passes over its samples of a step: in which type, with which random keys, and under which scale of the loss.

Knows no other rank, and neither when a step is taken nor what becomes of its gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from mpitrain.arrays import Allocator, Batch, Gradients, Key, ParameterSource
from mpitrain.method.precision import Precision
from mpitrain.nn.model import Model, Reduce
from mpitrain.parallel.checks import two_numbers


class Passes:
    """Runs a model forward and backward over microbatches, whose gradients are added up.

    Parameters
    ----------
    model : Model
        What is trained.
    key : Key
        The run's.
    precision : Precision, optional
        In which 16-bit type passes are computed; None: in the model's own type.
    allocator : Allocator
        Where parameters live, see `Precision.check`.

    Attributes
    ----------
    scaler : LossScaler, optional
        What finds the scale of the loss; None where it is not scaled.
    scale : float
        What the loss of the step under way is multiplied by, and so are its gradients.
    """

    def __init__(self, model: Model, key: Key, precision: Precision | None, allocator: Allocator) -> None:
        self._model, self._key = model, key.child("train")
        self._mixed = precision.check(model, allocator(0, model.layout.dtype)) if precision else None
        self.scaler, self.scale = (precision.scaler() if precision else None), 1.0

    def begin(self, step: int, microbatches: int) -> list[Key]:
        """Take the scale of a step, counted from 0; return the random key of each of its microbatches."""
        self.scale = self.scaler.scale if self.scaler else 1.0
        key = self._key.at(step)
        return [key.child(f"microbatch{number}") for number in range(microbatches)]

    def gradients(
        self, params: ParameterSource, microbatches: Sequence[Batch], grads: Gradients, reduce: Reduce | None, step: int
    ) -> tuple[float, float]:
        """Sum the gradients of a step's samples, times its scale, into ``grads``.

        Parameters
        ----------
        params : ParameterSource
            What is read.
        microbatches : sequence of Batch
            This rank's.
        grads : Gradients
            Zeroed first.
        reduce : callable, optional
            Sums over ranks what layers ask for, see `Model.loss_and_gradients`; None: they see these samples alone.
        step : int
            From 0.

        Returns
        -------
        (float, float)
            The sum of the losses, not scaled, and what it is to be divided by.
        """
        grads.zero()
        loss_sum = count = 0.0
        for batch, key in zip(microbatches, self.begin(step, len(microbatches)), strict=True):
            loss, weight = two_numbers(self._pass(params, batch, grads, key, reduce))
            loss_sum, count = loss_sum + loss, count + weight
            grads.end_pass()
        return loss_sum, count

    def _pass(self, params: ParameterSource, batch: Batch, grads: Gradients, key: Key, reduce: Reduce | None) -> Any:
        if self._mixed is None:
            return self._model.loss_and_gradients(params, batch, grads, key, reduce)
        with self.overflowing():
            return self._mixed.scaled_gradients(params, batch, grads, key, reduce, self.scale)

    def overflowing(self) -> AbstractContextManager[Any]:
        """Return a context in which float16 may overflow, for that is looked for, without a warning."""
        return np.errstate(over="ignore", invalid="ignore") if self.scaler else nullcontext()
