"""Two records of one job, compared: what differs, by how much, and which tensor is the first to.

Differences are measured by the norm of a tensor.  Some hold little but rounding errors (the gradient of a bias in front
of a BatchNorm is zero but for these), so that no tensor is measured by less than a hundredth of the whole model's norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan

import numpy as np

from mpitrain._errors import InputError, MismatchError
from mpitrain._typing import Array
from mpitrain.train.record import Record

TOLERANCES = {"float64": 1e-10, "float32": 1e-3}
"""By dtype: far above what rounding makes of a few steps, far below what a mistake does."""

_LEAST_SHARE = 0.01
_NORM_ROUNDING = 1e-12
"""Norms are added up in float64, shard by shard: their last digits may differ where no bit of a tensor does."""


@dataclass(frozen=True)
class Difference:
    """How far two numbers, or two tensors, are apart.

    Parameters
    ----------
    what : {"gradient", "gradient norm", "weights", "loss"}
        What was compared.
    tensor : str
        Name of the tensor; empty for the whole model.
    step : int
        Number of the step whose loss or gradient this is, or after which the weights were compared.
    size : float
        The norm of the difference; NaN where ranks do not agree among themselves.
    relative : float
        ``size`` divided by the norm of what was expected, or by a hundredth of the whole model's if that is larger.
    tolerance : float
        The largest ``relative`` that counts as equal.
    """

    what: str
    tensor: str
    step: int
    size: float
    relative: float
    tolerance: float

    @property
    def within(self) -> bool:
        """Whether the two count as equal."""
        return self.relative <= self.tolerance


@dataclass(frozen=True)
class Comparison:
    """How far two records are apart.

    Parameters
    ----------
    gradients, weights : sequence of Difference
        One for each tensor: of its gradient in the first step, and of its values after the last.
    norms : sequence of Difference
        One for each step from the second on and each tensor: of the norm of its gradient.
    losses, totals : sequence of Difference
        One for each step: of its loss, and of the norm of its whole gradient.
    """

    gradients: Sequence[Difference]
    weights: Sequence[Difference]
    norms: Sequence[Difference]
    losses: Sequence[Difference]
    totals: Sequence[Difference]

    @property
    def first(self) -> Difference | None:
        """The first that is beyond its tolerance: of the tensors in the order of training, then of the whole model."""
        found = (*self.gradients, *self.norms, *self.weights, *self.losses, *self.totals)
        return next((each for each in found if not each.within), None)


def worst(found: Sequence[Difference]) -> Difference:
    """Return the largest difference; one that is not a number is larger than any."""
    return max(found, key=lambda each: np.inf if isnan(each.relative) else each.relative)


def default_tolerance(record: Record, reproducible: bool) -> float:
    """Return the largest relative difference that counts as equal, by the dtype of a job; 0 if it is reproducible."""
    if reproducible:
        return 0.0
    return max(TOLERANCES.get(array.dtype.name, 0.0) for array in record.weights.values())


def compare(found: Record, expected: Record, tolerance: float) -> Comparison:
    """Compare two records.

    Raises
    ------
    InputError
        The tolerance is negative.
    MismatchError
        They are not of the same tensors and steps.
    """
    if not tolerance >= 0:
        raise InputError("the tolerance is negative", operation="verify", got=tolerance, expected="0 or more")
    _check_alike(found, expected)
    steps, of_norms = len(expected.losses), max(tolerance, _NORM_ROUNDING)
    wholes = np.sqrt(sum(np.square(norms) for norms in expected.norms.values()))
    totals = np.sqrt(sum(np.square(norms) for norms in found.norms.values()))
    by_step = [
        _numbers("gradient norm", name, step, found.norms[name][step - 1], norms[step - 1], of_norms, wholes[step - 1])
        for step in range(2, steps + 1)
        for name, norms in expected.norms.items()
    ]
    return Comparison(
        list(_tensors("gradient", 1, found.gradient, expected.gradient, tolerance)),
        list(_tensors("weights", steps, found.weights, expected.weights, tolerance)),
        by_step,
        list(_series("loss", found.losses, expected.losses, tolerance)),
        list(_series("gradient norm", totals, wholes, of_norms)),
    )


def _check_alike(found: Record, expected: Record) -> None:
    ours, theirs = ({name: array.shape for name, array in each.weights.items()} for each in (found, expected))
    if ours != theirs:
        differing = sorted({name for name, _ in ours.items() ^ theirs.items()})
        raise MismatchError("the two runs have other tensors", operation="verify", got=", ".join(differing))
    if len(found.losses) != len(expected.losses):
        raise MismatchError(
            "the two runs took not as many steps", operation="verify", got=len(found.losses),
            expected=len(expected.losses),
        )  # fmt: skip


def _tensors(
    what: str, step: int, found: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float
) -> Iterator[Difference]:
    sizes = {name: _norm(array) for name, array in expected.items()}
    least = _LEAST_SHARE * float(np.linalg.norm(list(sizes.values())))
    for name, right in expected.items():
        size = _norm(found[name].astype(np.float64) - right)
        yield _difference(what, name, step, size, max(sizes[name], least), tolerance)


def _series(what: str, found: Array, expected: Array, tolerance: float) -> Iterator[Difference]:
    for step, (left, right) in enumerate(zip(found, expected, strict=True), 1):
        yield _numbers(what, "", step, left, right, tolerance)


def _numbers(
    what: str, tensor: str, step: int, found: float, expected: float, tolerance: float, whole: float = 0.0
) -> Difference:
    unit = max(abs(expected), _LEAST_SHARE * whole)
    return _difference(what, tensor, step, abs(found - expected), unit, tolerance)


def _difference(what: str, tensor: str, step: int, size: float, unit: float, tolerance: float) -> Difference:
    relative = size / unit if unit else 0.0 if size == 0 else np.inf
    return Difference(what, tensor, step, float(size), float(relative), tolerance)


def _norm(array: Array) -> float:
    return float(np.linalg.norm(array.astype(np.float64).reshape(-1)))
