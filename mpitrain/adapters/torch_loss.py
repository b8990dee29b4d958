"""A loss function of PyTorch's as one of `mpitrain.nn`: a loss per sample, whose sum is minimised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from mpitrain._errors import DataError, InputError
from mpitrain._typing import Array, Shape
from mpitrain.arrays import Batch
from mpitrain.nn import Loss
from mpitrain.nn.loss import labels_or_samples, mean


class TorchLoss(Loss):
    """Adapts a function of outputs and targets.

    Parameters
    ----------
    function : callable
        From outputs (n, …) and targets to one loss for each sample, shape (n,), or for integer targets one for each
        label: ``torch.nn.CrossEntropyLoss(reduction="none")``.

    Raises
    ------
    InputError
        It is no function.

    Notes
    -----
    Losses are averaged over labels where targets are integers, else over samples.  The only metric is ``loss``.
    """

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        if not callable(function):
            raise InputError(
                "the loss is no function", operation="TorchLoss", got=repr(function),
                expected='a loss of mpitrain.nn, or a function, e.g. torch.nn.CrossEntropyLoss(reduction="none")',
            )  # fmt: skip
        self.function = function

    def count(self, batch: Batch) -> float:
        """Return the number of labels, or of samples where targets are not integers."""
        return labels_or_samples(batch)

    def check(self, outputs_shape: Shape, targets: Array) -> None:
        """Require as many targets as outputs."""
        if targets.shape[:1] != outputs_shape[:1]:
            raise DataError("loss: the targets do not fit the outputs", got=targets.shape, expected=outputs_shape)

    def evaluate(self, outputs: Array, targets: Array, gradient: Array) -> Array:
        """Let PyTorch compute the losses, and the gradient of each."""
        expected = targets.shape if targets.dtype.kind in "iu" else targets.shape[:1]
        if not len(targets):  # as for the module: the function need not know how to take none
            return np.zeros(expected, outputs.dtype)
        leaf = torch.from_numpy(outputs).requires_grad_()
        with torch.enable_grad():
            losses = self.function(leaf, tensor(targets, None))
        if tuple(losses.shape) != expected:
            raise InputError(
                "the loss function does not give one loss for each sample", operation="TorchLoss",
                got=f"shape {tuple(losses.shape)}", expected=f"shape {expected}", remedy='pass reduction="none"',
            )  # fmt: skip
        (found,) = torch.autograd.grad(losses.sum(), leaf)
        gradient[...] = found.numpy()
        values: Array = losses.detach().numpy().copy()
        return values

    def tallies(self, outputs: Array, targets: Array) -> dict[str, Array]:
        """Count nothing."""
        return {}

    def metrics(self, sums: Mapping[str, Array]) -> dict[str, Any]:
        """Return ``loss``."""
        return {"loss": mean(sums, "loss")}


def tensor(values: Array, dtype: Any) -> Any:
    """Return a tensor of an array: floats in ``dtype`` (None: their own), integers as int64, in memory of its own."""
    if values.dtype.kind in "iub":
        dtype = np.int64
    return torch.from_numpy(np.array(values, dtype=dtype or values.dtype, order="C"))
