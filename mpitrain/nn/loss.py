"""The contract of a loss: the losses of a batch, their gradient, and the sums from which metrics follow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from mpitrain._errors import DataError
from mpitrain._typing import Array, Shape
from mpitrain.arrays import Batch, namespace, to_host
from mpitrain.nn.layer import Context
from mpitrain.nn.pool import Pool


class Loss(ABC):
    """What training minimises: a loss per sample.  Losses of a batch are *summed*; dividing is the method's job.

    A subclass says what targets it takes (`check`), computes losses and gradients (`evaluate`), and counts what its
    metrics need (`tallies`, `metrics`).
    """

    @abstractmethod
    def check(self, outputs_shape: Shape, targets: Array) -> None:
        """Require that ``targets`` fit outputs of shape ``outputs_shape`` (n, …).

        Raises
        ------
        DataError
            The shape, the dtype or a value is wrong; for a value it names the value, its position and the range.
        """

    @abstractmethod
    def evaluate(self, outputs: Array, targets: Array, gradient: Array) -> Array:
        """Return the losses, unweighted, and write the gradient of each with respect to its outputs.

        Parameters
        ----------
        outputs : array, shape (n, …)
            What the model gave; not changed.
        targets : array
            Checked targets.
        gradient : array, shape and dtype of outputs
            Written.

        Returns
        -------
        array, shape (n, …), dtype of outputs
            A new array, one loss for each sample (or token).
        """

    @abstractmethod
    def tallies(self, outputs: Array, targets: Array) -> dict[str, Array]:
        """Return sums for the metrics beyond the loss; same keys and shapes for every batch, an empty one included."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, Array]) -> dict[str, Any]:
        """Turn `sums`, added over batches and ranks, into metrics; ``loss`` is among them."""

    def count(self, batch: Batch) -> float:
        """Return what the sum of losses is to be divided by: the number of samples, whatever their weights."""
        return float(len(batch))

    def forward(self, outputs: Array, batch: Batch, pool: Pool) -> tuple[float, Context]:
        """Return the weighted sum of the batch's losses, and what `backward` needs.

        Raises
        ------
        DataError
            The targets do not fit, see `check`.
        """
        self.check(outputs.shape, batch.targets)
        context = Context(pool, namespace(outputs))
        gradient = context.take(outputs.shape, outputs.dtype)
        losses = self.evaluate(outputs, batch.targets, gradient)
        if batch.weights is not None:
            if batch.weights.shape != (len(batch),):
                raise DataError(
                    "loss: there is not one weight a sample", got=batch.weights.shape, expected=(len(batch),)
                )
            weights = batch.weights.astype(outputs.dtype, copy=False)
            losses *= _along_first(weights, losses)
            gradient *= _along_first(weights, gradient)
        context["gradient"] = gradient
        return float(losses.sum(dtype=np.float64)), context

    def backward(self, context: Context) -> Array:
        """Return the gradient of the sum of losses with respect to the outputs; valid until the context's release."""
        gradient: Array = context["gradient"]
        return gradient

    def sums(self, outputs: Array, batch: Batch) -> dict[str, Array]:
        """Return ``count``, ``loss`` (the weighted sum) and the `tallies` of a batch, float64 NumPy arrays."""
        loss_sum, _ = self.forward(outputs, batch, Pool())
        found = {
            name: to_host(value).astype(np.float64) for name, value in self.tallies(outputs, batch.targets).items()
        }
        return {"count": np.array(self.count(batch)), "loss": np.array(loss_sum), **found}


def mean(sums: Mapping[str, Array], name: str) -> float:
    """Return ``sums[name]`` divided by the count; nan if nothing was counted."""
    count = float(sums["count"])
    return float(sums[name]) / count if count else float("nan")


def labels_or_samples(batch: Batch) -> float:
    """Return the number of labels of a batch whose targets are integers, else the number of samples."""
    return float(batch.targets.size if batch.targets.dtype.kind in "iu" else len(batch))


def same_shape(loss: str, outputs_shape: Shape, targets: Array) -> None:
    """Require one target per output; (n,) will do for outputs (n, 1)."""
    if targets.shape != outputs_shape and (*targets.shape, 1) != outputs_shape:
        raise DataError(
            f"{loss}: the targets do not fit the model's outputs",
            got=f"targets of shape {targets.shape} for outputs of shape {outputs_shape}",
            expected=f"targets of shape {outputs_shape}",
        )


def first_position(wrong: Array) -> tuple[int, ...]:
    """Return where a boolean array is first true."""
    return tuple(int(axis[0]) for axis in wrong.nonzero())


def _along_first(weights: Array, like: Array) -> Array:
    return weights.reshape(-1, *(1,) * (like.ndim - 1))
