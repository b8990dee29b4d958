"""What a model is given: some samples, their targets, and where they stand in the global batch."""

from __future__ import annotations

from dataclasses import dataclass

from mpitrain._errors import InputError
from mpitrain._options import brief
from mpitrain._typing import Array

_FIELDS = ("inputs", "targets", "index", "weights")
_REMEDY = "of a batch by itself, pass index=numpy.arange(n)"


@dataclass(frozen=True)
class Batch:
    """One rank's share of a (micro)batch; it may be empty.

    Parameters
    ----------
    inputs : array, shape (n, …)
        Samples; images are channels-last: (n, height, width, channels).
    targets : array, shape (n, …)
        Integer labels (n,), or values (n, outputs).
    index : array of int64, shape (n,)
        Position of each sample in the global batch: the same on every layout, so that what is random per sample
        (dropout) is keyed by it.
    weights : array of float, shape (n,), optional
        Factor on each sample's loss; ones if None.

    Raises
    ------
    InputError
        One of them is no array of n rows, or the index does not hold integers.
    """

    inputs: Array
    targets: Array
    index: Array
    weights: Array | None = None

    def __post_init__(self) -> None:
        if not self._is_usual():
            self._check()

    def _is_usual(self) -> bool:
        """Tell whether these are arrays that fit together, in as little time as can be: steps make batches."""
        try:
            rows, weights = self.inputs.shape[0], self.weights
            fits = self.index.shape == (rows,) and self.targets.shape[0] == rows
            return fits and self.index.dtype.kind in "iu" and (weights is None or weights.shape[0] == rows)
        except (AttributeError, IndexError, TypeError):
            return False

    def _check(self) -> None:
        """Raise an InputError if something is wrong, which says what."""
        for name in _FIELDS if self.weights is not None else _FIELDS[:-1]:
            self._check_rows(name)
        dtype, shape = str(self.index.dtype), self.index.shape
        if len(shape) != 1 or "int" not in dtype:  # torch.int64 is right, too
            raise InputError(
                "index is not an integer for each sample", operation="Batch", got=f"{dtype} of shape {shape}",
                remedy=_REMEDY,
            )  # fmt: skip

    def _check_rows(self, name: str) -> None:
        """Raise an InputError unless a field is an array with a row for each sample."""
        array = getattr(self, name)
        shape = getattr(array, "shape", ())
        if not (shape and hasattr(array, "dtype")):
            raise InputError(
                f"{name} has no rows", operation="Batch", got=brief(array), expected="an array of shape (n, …)",
                remedy=_REMEDY if name == "index" else f"convert {name} with numpy.asarray",
            )  # fmt: skip
        if shape[0] != len(self):
            raise InputError(
                f"{name} has another number of rows than inputs", operation="Batch", got=shape[0], expected=len(self)
            )

    def __len__(self) -> int:
        return int(self.inputs.shape[0])

    def part(self, rows: slice) -> Batch:
        """Return the batch of some of the samples, as views."""
        weights = None if self.weights is None else self.weights[rows]
        return Batch(self.inputs[rows], self.targets[rows], self.index[rows], weights)
