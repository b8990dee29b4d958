"""The global batches of a run, from which a method cuts its shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpitrain._options import check_whole
from mpitrain._typing import Array
from mpitrain.data.dataset import Dataset, check_dataset
from mpitrain.data.loader import Loader
from mpitrain.data.partition import partition


@dataclass(frozen=True, eq=False)
class Batches:
    """Global batches of a data set: the same for any number of ranks that share them.

    Parameters
    ----------
    dataset : Dataset
        The rows to train on; the same on all ranks.
    batch_size : int
        Rows of a global batch: over all ranks and microbatches.
    seed : int
        The order of the rows and a random partition depend on it.
    owners : str, optional
        Key of `PARTITIONS`: which rank takes which rows.  None: each batch is dealt out evenly.
    owner_options : mapping
        Options of that partition.
    sampling, sampling_weights, drop_last, dtype
        As for `Loader`.

    Raises
    ------
    InputError
        The data set is none, or a number is no integer, or too small.
    """

    dataset: Dataset
    batch_size: int
    seed: int
    owners: str | None = None
    owner_options: Mapping[str, Any] = field(default_factory=dict)
    sampling: str = "shuffle"
    sampling_weights: Array | None = None
    drop_last: bool = False
    dtype: Any = np.float32

    def __post_init__(self) -> None:
        check_dataset("Batches", self.dataset)
        check_whole("Batches", "batch_size", self.batch_size, 1)
        check_whole("Batches", "seed", self.seed, 0)

    def __str__(self) -> str:
        """Describe the batches in one line: rows, seed, sampling and owners (not the weights or options of these)."""
        rest = f", {self.sampling}" + f", owners {self.owners}" * bool(self.owners) + ", drop_last" * self.drop_last
        rows = f"{len(self.dataset)} rows of {self.dataset.name}"
        return f"batches of {self.batch_size} of {rows}, seed {self.seed}{rest}"

    def share(self, rank: int, size: int, microbatches: int = 1) -> Loader:
        """Return one of ``size`` shares, each global batch cut into microbatches first.

        Raises
        ------
        InputError
            The numbers do not fit together: more ranks than rows, a batch smaller than the ranks, …

        Notes
        -----
        Not collective.
        """
        owner = None
        if self.owners is not None:
            owner = partition(self.owners, self.dataset, size, seed=self.seed, options=self.owner_options)
        return Loader(
            self.dataset,
            self.batch_size,
            seed=self.seed,
            rank=rank,
            size=size,
            owner=owner,
            sampling=self.sampling,
            sampling_weights=self.sampling_weights,
            microbatches=microbatches,
            drop_last=self.drop_last,
            dtype=self.dtype,
        )
