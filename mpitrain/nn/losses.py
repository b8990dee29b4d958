"""The losses: cross-entropy for classes, binary cross-entropy for yes or no, mean squared error for numbers."""

from __future__ import annotations

from collections.abc import Mapping
from math import log, prod, sqrt
from typing import Any

import numpy as np

from mpitrain._errors import DataError, InputError
from mpitrain._options import check_kind
from mpitrain._typing import Array, Shape
from mpitrain.arrays import Batch, namespace
from mpitrain.nn import checks
from mpitrain.nn.loss import Loss, first_position, mean, same_shape

CONFUSION_CLASSES = 1000
"""Most classes for which a confusion matrix is counted; a large vocabulary's would not fit into memory."""


class CrossEntropy(Loss):
    """Negative log-likelihood of the right class: ``−log softmax(outputs)[label]``.

    Outputs are logits (n, …, k), targets integer labels (n, …) in [0, k).  With further axes (the tokens of a text)
    each label counts, so that losses are averaged over tokens.

    Parameters
    ----------
    label_smoothing : float
        ε in [0, 1): the target is (1 − ε) of the right class and ε / k of every class.
    unit : str
        What a label is one of, if it is part of a text: ``"character"``, ``"byte"``, ``"token"``.

    Notes
    -----
    Smoothing: Szegedy and others, "Rethinking the Inception architecture", CVPR 2016, section 7.  Metrics: ``loss``,
    ``accuracy``, for up to 1000 classes ``confusion`` (k, k), rows are true classes and columns predicted ones, and
    with a unit ``bits_per_character`` (or byte, token): the loss over log 2.
    """

    def __init__(self, label_smoothing: float = 0.0, unit: str = "") -> None:
        self.label_smoothing = checks.fraction("CrossEntropy: label_smoothing", label_smoothing)
        check_kind("CrossEntropy", "unit", unit, str, 'what a token is, e.g. "byte", or "" for no unit')
        self.unit = unit
        if unit and label_smoothing:
            raise InputError(
                "CrossEntropy: with smoothing, the loss is not the length of a code", got=f"unit {unit!r}",
                expected="label_smoothing 0, or no unit",
            )  # fmt: skip

    def check(self, outputs_shape: Shape, targets: Array) -> None:
        """Require integer labels in range, one for each row of logits."""
        if targets.dtype.kind not in "iu":
            raise DataError("cross_entropy: labels are not integers", got=targets.dtype, expected="an integer dtype")
        *labels_shape, classes = outputs_shape
        if targets.shape != tuple(labels_shape):
            raise DataError(
                "cross_entropy: the labels do not fit the model's outputs",
                got=f"labels of shape {targets.shape} for outputs of shape {outputs_shape}",
                expected=f"labels of shape {tuple(labels_shape)}",
            )
        if targets.size and (targets.min() < 0 or targets.max() >= classes):
            position = first_position((targets < 0) | (targets >= classes))
            raise DataError(
                f"cross_entropy: the label at position {_plain(position)} is out of range",
                got=int(targets[position]),
                expected=f"0 to {classes - 1} for the model's {classes} outputs",
            )

    def count(self, batch: Batch) -> float:
        """Return the number of labels."""
        return float(batch.targets.size)

    def evaluate(self, outputs: Array, targets: Array, gradient: Array) -> Array:
        """Compute ``log Σ exp(z) − z[label]`` with the maximum taken off first, so that nothing overflows."""
        xp, classes = namespace(outputs), outputs.shape[-1]
        labels = targets.ravel()
        logits, work = outputs.reshape(labels.size, classes), gradient.reshape(labels.size, classes)
        picked = (xp.arange(labels.size), labels)
        xp.subtract(logits, logits.max(axis=1, keepdims=True), out=work)
        losses: Array = (self.label_smoothing - 1.0) * work[picked]
        if self.label_smoothing:
            losses -= self.label_smoothing * work.mean(axis=1)
        xp.exp(work, out=work)
        total = work.sum(axis=1, keepdims=True)
        losses += xp.log(total[:, 0])
        work /= total
        if self.label_smoothing:
            work -= self.label_smoothing / classes
        work[picked] -= 1.0 - self.label_smoothing
        return losses.reshape(targets.shape)

    def tallies(self, outputs: Array, targets: Array) -> dict[str, Array]:
        """Count the correct labels, and pairs of true and predicted class."""
        classes = outputs.shape[-1]
        labels, predicted = targets.ravel(), outputs.argmax(axis=-1).ravel()
        found = {"correct": (labels == predicted).sum()}
        if classes <= CONFUSION_CLASSES:
            found["confusion"] = confusion(labels, predicted, classes)
        return found

    def metrics(self, sums: Mapping[str, Array]) -> dict[str, Any]:
        """Return ``loss``, ``accuracy``, ``confusion`` and bits per unit."""
        found: dict[str, Any] = {"loss": mean(sums, "loss"), "accuracy": mean(sums, "correct")}
        if self.unit:
            found[f"bits_per_{self.unit}"] = found["loss"] / log(2.0)
        if "confusion" in sums:
            found["confusion"] = sums["confusion"].astype(np.int64)
        return found


class BinaryCrossEntropy(Loss):
    """Negative log-likelihood of yes or no: ``−t log σ(z) − (1 − t) log(1 − σ(z))``, averaged over a sample's outputs.

    Outputs are logits (n, k); targets are 0 or 1, shape (n, k), or (n,) for k = 1.  Metrics: ``loss``, ``accuracy``
    (over all outputs) and ``confusion`` (2, 2), rows are true and columns predicted.
    """

    def check(self, outputs_shape: Shape, targets: Array) -> None:
        """Require a 0 or 1 for each output."""
        same_shape("bce", outputs_shape, targets)
        wrong = (targets != 0) & (targets != 1)
        if wrong.any():
            position = first_position(wrong)
            raise DataError(
                f"bce: the target at position {_plain(position)} is wrong", got=targets[position], expected="0 or 1"
            )

    def evaluate(self, outputs: Array, targets: Array, gradient: Array) -> Array:
        """Compute ``max(z, 0) − z t + log(1 + exp(−|z|))``, in which nothing overflows."""
        xp, wanted = namespace(outputs), _as_outputs(targets, outputs)
        decay = xp.exp(-xp.abs(outputs))
        losses = xp.maximum(outputs, 0) - outputs * wanted + xp.log1p(decay)
        xp.divide(xp.where(outputs >= 0, 1, decay), 1 + decay, out=gradient)
        gradient -= wanted
        gradient /= _per_sample(outputs)
        return _sample_means(losses)

    def tallies(self, outputs: Array, targets: Array) -> dict[str, Array]:
        """Count pairs of true and predicted value."""
        return {"confusion": confusion(targets.ravel().astype(np.int64), (outputs > 0).ravel(), 2)}

    def metrics(self, sums: Mapping[str, Array]) -> dict[str, Any]:
        """Return ``loss``, ``accuracy`` and ``confusion``."""
        confusion = sums["confusion"]
        total = float(confusion.sum())
        accuracy = float(np.trace(confusion)) / total if total else float("nan")
        return {"loss": mean(sums, "loss"), "accuracy": accuracy, "confusion": confusion.astype(np.int64)}


class MeanSquaredError(Loss):
    """Mean over a sample's outputs of ``(output − target)²``.

    Outputs are (n, k); targets (n, k), or (n,) for k = 1.  Metrics: ``loss``, ``rmse`` (the root of the mean over
    samples and outputs) and ``r2`` (the mean over outputs of 1 − Σ(y − ŷ)² / Σ(y − ȳ)²; an output whose target is
    constant counts 1 if it is met exactly, else 0, as in scikit-learn).

    Notes
    -----
    The spread of the targets comes from Σy and Σy² in float64, of whose 16 digits twice as many are lost as the mean
    of the targets has in front of their standard deviation: one part in 10⁴ is left at a ratio of 10⁶.
    """

    def check(self, outputs_shape: Shape, targets: Array) -> None:
        """Require a target for each output."""
        same_shape("mse", outputs_shape, targets)

    def evaluate(self, outputs: Array, targets: Array, gradient: Array) -> Array:
        """Compute the squared differences."""
        xp = namespace(outputs)
        xp.subtract(outputs, _as_outputs(targets, outputs), out=gradient)
        losses = _sample_means(gradient * gradient)
        gradient *= 2.0 / _per_sample(outputs)
        return losses

    def tallies(self, outputs: Array, targets: Array) -> dict[str, Array]:
        """Sum targets, their squares and the squared errors, for each output."""
        shape = (outputs.shape[0], _per_sample(outputs))
        wanted = targets.reshape(shape).astype(np.float64)
        errors = outputs.reshape(shape) - wanted
        return {
            "targets": wanted.sum(axis=0),
            "targets_squared": (wanted * wanted).sum(axis=0),
            "squared_error": (errors * errors).sum(axis=0),
        }

    def metrics(self, sums: Mapping[str, Array]) -> dict[str, Any]:
        """Return ``loss``, ``rmse`` and ``r2``."""
        count, errors = float(sums["count"]), sums["squared_error"]
        if not count:
            return dict.fromkeys(("loss", "rmse", "r2"), float("nan"))
        spread = np.maximum(sums["targets_squared"] - sums["targets"] ** 2 / count, 0.0)
        explained = 1.0 - errors / np.where(spread > 0, spread, 1.0)
        r2 = np.where(spread > 0, explained, errors == 0)
        return {"loss": mean(sums, "loss"), "rmse": sqrt(errors.mean() / count), "r2": float(r2.mean())}


def _per_sample(outputs: Array) -> int:
    """Return how many outputs a sample has."""
    return prod(outputs.shape[1:])


def _sample_means(values: Array) -> Array:
    """Return the mean of each sample's values, shape (n,)."""
    means: Array = values.reshape(values.shape[0], _per_sample(values)).mean(axis=1)
    return means


def _as_outputs(targets: Array, outputs: Array) -> Array:
    """Return the targets in the outputs' shape and dtype."""
    return targets.reshape(outputs.shape).astype(outputs.dtype, copy=False)


def confusion(labels: Array, predicted: Array, classes: int) -> Array:
    """Count the pairs (true class, predicted class), shape (classes, classes)."""
    pairs = labels.astype(np.int64) * classes + predicted
    counts: Array = namespace(labels).bincount(pairs, minlength=classes * classes)
    return counts.reshape(classes, classes)


def _plain(position: tuple[int, ...]) -> str:
    return str(position[0]) if len(position) == 1 else str(position)
