"""Which samples a rank takes of each global batch: every sample once in an epoch, none twice to fill up."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from numbers import Integral

import numpy as np

from mpitrain._errors import InputError
from mpitrain._options import check_kind, check_whole
from mpitrain.arrays import Key
from mpitrain.comm import Communicator


class DistributedSampler:
    """A rank's part of each global batch, as the ``batch_sampler`` of a PyTorch ``DataLoader``.

    Parameters
    ----------
    dataset : sized, or int
        The data set, or its number of samples; the same on all ranks.
    comm : Communicator
        The ranks that share each batch.
    batch_size : int
        Samples per rank and step, at most; one step fewer is taken, of larger batches, where a rank would have none.
    shuffle : bool
        Whether each epoch takes another order.
    seed : int
        Of the order, which depends on it and the epoch alone, and not on the number of ranks.

    Raises
    ------
    InputError
        There are fewer samples than ranks, the data set has no length, or the batch size is no positive integer.

    Notes
    -----
    An epoch of n samples has min(⌈n / (p · batch_size)⌉, ⌊n / p⌋) steps on every rank, so that all p meet in each.  The
    second is less only where the batch size is 1 and p does not divide n: some shares then are 2.  The samples are cut
    into global batches, and these into shares, of sizes that differ by at most one: none is empty, none is padded,
    and no sample is left out.  PyTorch's sampler repeats samples until shares are equal, or drops some.  Shares being
    uneven, pass their sizes to ``step(count=...)``.
    """

    def __init__(
        self, dataset: Sized | int, comm: Communicator, batch_size: int, *, shuffle: bool = True, seed: int = 0
    ) -> None:
        check_whole("DistributedSampler", "batch_size", batch_size, 1)
        kinds, expected = (Sized, Integral), "a data set that has a length, or its number of samples"
        check_kind("DistributedSampler", "dataset", dataset, kinds, expected)
        self.samples = len(dataset) if isinstance(dataset, Sized) else int(dataset)
        self._rank, self._size = comm.rank, comm.size
        self._key = Key(seed, "mpitrain.torch/sampler") if shuffle else None
        self.epoch = 0
        if self.samples < comm.size:
            raise InputError(
                "some ranks would have no samples", operation="DistributedSampler", got=f"{self.samples} samples",
                expected=f"at least one sample for each of {comm.size} ranks",
            )  # fmt: skip
        self.steps = int(min(-(-self.samples // (batch_size * comm.size)), self.samples // comm.size))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes; else each iteration takes the next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.samples) if self._key is None else self._key.at(self.epoch).permutation(self.samples)
        self.epoch += 1
        for step in range(self.steps):
            batch = _part(order, step, self.steps)
            yield _part(batch, self._rank, self._size).tolist()


def _part(rows: np.ndarray, number: int, parts: int) -> np.ndarray:
    """Return one of ``parts`` stretches of nearly equal size."""
    return rows[len(rows) * number // parts : len(rows) * (number + 1) // parts]
