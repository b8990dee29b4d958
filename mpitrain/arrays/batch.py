"""What a model is given: some samples, their targets, and where they stand in the global batch."""

from __future__ import annotations

from dataclasses import dataclass

from mpitrain._typing import Array


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
    """

    inputs: Array
    targets: Array
    index: Array
    weights: Array | None = None

    def __len__(self) -> int:
        return int(self.inputs.shape[0])

    def part(self, rows: slice) -> Batch:
        """Return the batch of some of the samples, as views."""
        weights = None if self.weights is None else self.weights[rows]
        return Batch(self.inputs[rows], self.targets[rows], self.index[rows], weights)
