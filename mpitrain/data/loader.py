"""Which samples a rank gets at a step: a pure function of the step, so that there is no position to save.

The global batch is drawn first, and is the same for any number of ranks; it is cut into global microbatches, and each
of these into the ranks' shares.  Nothing is sent for that: every rank opens the data set itself (a file is
memory-mapped, so the ranks of a node share its pages) and computes the same row numbers, of which it gathers its own.
A data set is never broadcast.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from numbers import Integral
from typing import Any

import numpy as np

from mpitrain._errors import DataError, InputError
from mpitrain._options import check_kind, check_whole, choose
from mpitrain._typing import Array, DType
from mpitrain.arrays import Batch, Key
from mpitrain.arrays.dtypes import floating
from mpitrain.data.checks import check_types
from mpitrain.data.dataset import Dataset, check_dataset
from mpitrain.data.rows import gather
from mpitrain.data.sampling import SAMPLINGS, importance_factors, importance_probabilities
from mpitrain.data.shares import share, share_sizes


class Loader:
    """Gives a rank its share of each global batch.

    Parameters
    ----------
    dataset : Dataset
        The rows to train on; the same on all ranks.
    batch_size : int
        Rows of a global batch: over all ranks and microbatches.
    seed : int
        The job's seed.
    rank, size : int
        Which of how many ranks this is.
    owner : array of int, shape (n,), optional
        The rank that owns each row (see `partition`): of each microbatch, a rank gets the rows that it owns, often
        uneven in number and sometimes none.  Without it, each rank gets a contiguous, near-equal run of positions.
    sampling : {"shuffle", "sequential", "importance"}
        How an epoch takes the rows.
    sampling_weights : array of float, shape (n,), optional
        ``importance`` only: rows are drawn with probability in proportion to these.
    microbatches : int
        Into how many microbatches a global batch is cut, near-equal in size.
    drop_last : bool
        Leave out the smaller batch at the end of an epoch.
    dtype : {float32, float64}
        What inputs (tokens excepted) and the targets of a regression are cast to.

    Attributes
    ----------
    steps_per_epoch : int
        Number of global batches in an epoch.

    Raises
    ------
    InputError
        The numbers do not fit together: more ranks than rows, a batch smaller than the ranks, …

    Notes
    -----
    Not collective.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        size: int = 1,
        owner: Array | None = None,
        sampling: str = "shuffle",
        sampling_weights: Array | None = None,
        microbatches: int = 1,
        drop_last: bool = False,
        dtype: Any = np.float32,
    ) -> None:
        check_dataset("loader", dataset)
        self._owner = None if owner is None else np.asarray(owner)
        _check_ranks(len(dataset), rank, size, self._owner)
        _check_batch(len(dataset), batch_size, microbatches, sharers=size if owner is None else 1)
        _check_sampling(sampling, sampling_weights)
        self.dataset = dataset
        self.batch_size = batch_size
        self.microbatches = microbatches
        self.steps_per_epoch = len(dataset) // batch_size if drop_last else -(-len(dataset) // batch_size)
        self._rank, self._size = rank, size
        self._dtype = floating(dtype, "loader")
        self._sampling = SAMPLINGS[sampling]
        self._key = Key(seed, sampling)
        self._probabilities: Array | None = None
        self._factors: Array | None = None
        if sampling == "importance":
            self._probabilities = importance_probabilities(sampling_weights, len(dataset))
            self._factors = importance_factors(self._probabilities).astype(self._dtype)
        self._cached: tuple[int, Array] | None = None

    def epoch(self, step: int) -> int:
        """Return the epoch, from 0, to which a step belongs."""
        return step // self.steps_per_epoch

    def order(self, epoch: int) -> Array:
        """Return the rows that an epoch takes, in order: int64, shape (n,), the same on all ranks."""
        if self._cached is None or self._cached[0] != epoch:
            order = self._sampling(len(self.dataset), self._key.at(epoch), self._probabilities)
            self._cached = epoch, order
        return self._cached[1]

    def batch(self, step: int) -> list[Batch]:
        """Return this rank's share of each microbatch of a step.

        Parameters
        ----------
        step : int
            Number of the step, from 0.

        Returns
        -------
        list of Batch
            As many as there are microbatches, each perhaps empty here, and of a short last batch perhaps everywhere.
            Arrays are new, so that batches of several steps can be held at a time.
        """
        check_whole("loader", "step", step, 0)
        rows = self._global_batch(step)
        cuts = (share(len(rows), self.microbatches, number) for number in range(self.microbatches))
        return [self._share(rows, start, stop) for start, stop in cuts]

    def shares(self, epoch: int = 0) -> Array:
        """Return how many rows each rank gets in an epoch: int64, shape (size,), the same on all ranks."""
        order = self.order(epoch)[: self.steps_per_epoch * self.batch_size]
        if self._owner is not None:
            return np.bincount(self._owner[order], minlength=self._size)
        full, rest = divmod(len(order), self.batch_size)
        return full * self._batch_shares(self.batch_size) + self._batch_shares(rest)

    def _batch_shares(self, rows: int) -> Array:
        sizes = (share_sizes(int(part), self._size) for part in share_sizes(rows, self.microbatches))
        return reduce(np.add, sizes)

    def _global_batch(self, step: int) -> Array:
        epoch, number = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[number * self.batch_size : (number + 1) * self.batch_size]

    def _share(self, rows: Array, start: int, stop: int) -> Batch:
        """Return this rank's part of the microbatch at positions ``[start, stop)`` of the global batch."""
        if self._owner is None:
            low, high = share(stop - start, self._size, self._rank)
            index = np.arange(start + low, start + high)
        else:
            index = start + np.flatnonzero(self._owner[rows[start:stop]] == self._rank)
        mine = rows[index]
        weights = None if self._factors is None else self._factors[mine]
        return _batch(self.dataset, mine, index, self._dtype, weights)


def evaluation_batches(
    dataset: Dataset, batch_size: int, rank: int = 0, size: int = 1, dtype: Any = np.float32
) -> Iterator[Batch]:
    """Walk once over a data set, every row on exactly one rank.

    Parameters
    ----------
    dataset : Dataset
        What to evaluate on; may be empty.
    batch_size : int
        Rows of a batch, over all ranks.
    rank, size : int
        Which of how many ranks this is.
    dtype : {float32, float64}
        As for `Loader`.

    Returns
    -------
    iterator of Batch
        Equally many on every rank, and each may be empty; ``index`` is the row's number in the data set.
    """
    check_dataset("evaluation", dataset)
    check_whole("evaluation", "batch_size", batch_size, 1)
    _check_rank("evaluation", rank, size)
    compute = floating(dtype, "evaluation")
    for start in range(0, len(dataset), batch_size):
        low, high = share(min(batch_size, len(dataset) - start), size, rank)
        index = np.arange(start + low, start + high)
        yield _batch(dataset, index, index, compute)


def _batch(dataset: Dataset, rows: Array, index: Array, dtype: DType, weights: Array | None = None) -> Batch:
    check_types(dataset)  # what follows would cut labels of 0.5 down to 0
    inputs, targets = gather(dataset.inputs, rows), gather(dataset.targets, rows)  # not checked: they are ours
    inputs = inputs if dataset.tokens else _cast(inputs, dtype, dataset.name)
    targets = _cast(targets, dtype if dataset.task == "regression" else np.dtype(np.int64), dataset.name)
    return Batch(inputs, targets, index, weights)


def _cast(values: Array, dtype: DType, name: str) -> Array:
    if values.dtype == dtype:
        return values
    try:
        with np.errstate(over="raise"):
            return values.astype(dtype)
    except FloatingPointError as error:
        largest = values.flat[np.nanargmax(np.abs(values))]
        raise DataError(
            f"{name}: a value is too large for {dtype}", operation="loader", got=largest,
            expected=f"at most {np.finfo(dtype).max:g}", remedy="scale the data",
        ) from error  # fmt: skip


def _check_sampling(sampling: str, weights: Array | None) -> None:
    choose(SAMPLINGS, "sampling", sampling)
    if weights is not None and sampling != "importance":
        raise InputError("loader: sampling_weights are for importance sampling", got=f"sampling {sampling!r}")


def _check_ranks(rows: int, rank: int, size: int, owner: Array | None) -> None:
    if not rows:
        raise InputError("loader: the data set is empty", got="0 rows", expected="at least one")
    _check_rank("loader", rank, size)
    if owner is not None:
        _check_owner(owner, rows, size)
    elif size > rows:
        raise InputError(
            "loader: more ranks than samples", got=f"{size} ranks, {rows} samples", expected="a sample for each rank",
            remedy=f"start at most {rows} ranks",
        )  # fmt: skip


def _check_rank(operation: str, rank: int, size: int) -> None:
    check_kind(operation, "rank", rank, Integral, "a whole number")
    check_whole(operation, "size", size, 1)
    if not 0 <= rank < size:
        raise InputError(f"{operation}: no such rank", got=f"rank {rank} of {size}", expected=f"0 to {size - 1}")


def _check_batch(rows: int, batch_size: int, microbatches: int, sharers: int) -> None:
    check_whole("loader", "batch_size", batch_size, 1)
    check_whole("loader", "microbatches", microbatches, 1)
    if batch_size > rows:
        raise InputError(
            "loader: the batch does not fit the data set", got=f"batch_size {batch_size} with {rows} rows",
            expected=f"1 to {rows}",
        )  # fmt: skip
    if microbatches > batch_size:
        raise InputError(
            "loader: the batch cannot be cut", got=f"{microbatches} microbatches of {batch_size} rows",
            expected=f"1 to {batch_size} microbatches",
        )  # fmt: skip
    if sharers > batch_size:
        raise InputError(
            "loader: the batch is smaller than the number of ranks", got=f"batch_size {batch_size}, {sharers} ranks",
            expected="a sample for each rank", remedy=f"set batch_size to {sharers} or more, or start fewer ranks",
        )  # fmt: skip


def _check_owner(owner: Array, rows: int, size: int) -> None:
    if owner.shape != (rows,) or owner.dtype.kind not in "iu":
        got = f"{owner.dtype} of shape {owner.shape}"
        raise InputError("loader: not one owner for each row", got=got, expected=f"integers of shape ({rows},)")
    if owner.min() < 0 or owner.max() >= size:
        got = f"owners {owner.min()} to {owner.max()}"
        raise InputError("loader: a row's owner is no rank", got=got, expected=f"0 to {size - 1}")
