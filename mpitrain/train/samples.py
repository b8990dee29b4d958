"""A job's data: what is trained on, what is held out, and the batches that ranks take of both.

Every rank reads the data by itself; nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from mpitrain import data
from mpitrain._errors import DataError, JobError
from mpitrain._typing import Array
from mpitrain.arrays import Batch
from mpitrain.data import Batches, Dataset, Standardise
from mpitrain.train.facts import Facts, arrays_sha256, rows_sha256
from mpitrain.train.job import Job
from mpitrain.train.job.userfile import call_object

_EVALUATION_ROWS = 1024


@dataclass(frozen=True)
class Samples:
    """A job's data: the parts, what was done to the inputs, and how often rows are to be drawn."""

    train: Dataset
    held_out: dict[str, Dataset]  # by kind: "valid" if the job asks for it, and "test"
    standardise: Standardise | None
    weights: Array | None  # of the rows to train on, where some are drawn more often

    @cached_property
    def facts(self) -> Facts:
        """What the model must know of them, and what tells them from others."""
        also_read = {kind: rows_sha256(part) for kind, part in self.held_out.items()}
        if self.weights is not None:
            also_read["weights"] = arrays_sha256([self.weights])
        return Facts.of(self.train, self.standardise, **also_read)


def load_samples(job: Job) -> Samples:
    """Read the data set and the weights, hold parts of the set out, and standardise by the rest."""
    section, weights = job.data, _sampling_weights(job)
    whole = _dataset(job)
    if section.folds:
        train, test = list(data.folds(whole, section.folds, seed=job.seed, stratified=section.stratified))[section.fold]
    else:
        train, test = _cut(whole, section.test, job)
    held_out = {"test": test}
    if section.valid:
        train, valid = _cut(train, section.valid / (1 - section.held_out), job)
        held_out = {"valid": valid, "test": test}
    if not section.standardise:
        return Samples(train, held_out, None, weights)
    standardise = Standardise.fit(train)
    held_out = {kind: standardise(part) for kind, part in held_out.items()}
    return Samples(standardise(train), held_out, standardise, weights)


def _cut(dataset: Dataset, fraction: float, job: Job) -> tuple[Dataset, Dataset]:
    """Hold out a fraction of the rows."""
    if job.data.hold_out == "end":
        return data.split_end(dataset, fraction)
    return data.split(dataset, fraction, seed=job.seed, stratified=job.data.stratified)


def _dataset(job: Job) -> Dataset:
    section = job.data
    if section.build:
        found = call_object(section.build, section.options)
        if not isinstance(found, Dataset):
            raise JobError(
                "data.build gave no data set", operation=section.build, got=type(found).__name__,
                expected="mpitrain.Dataset",
            )  # fmt: skip
        found.check()
        return found
    return data.load(section.source, section.arguments())


def global_batches(job: Job, samples: Samples) -> Batches:
    """Return the global batches of the rows to train on."""
    section, train = job.data, samples.train
    return Batches(
        train,
        len(train) if job.train.batch_size == "full" else job.train.batch_size,
        job.seed,
        owners=None if section.partition == "none" else section.partition,
        owner_options=section.partition_options.model_dump(exclude_none=True),
        sampling=section.sampling,
        sampling_weights=samples.weights,
        drop_last=job.train.drop_last,
        dtype=job.dtype,
    )


def _sampling_weights(job: Job) -> Array | None:
    if job.data.weights is None:
        return None
    try:
        with open(job.data.weights, "rb") as file:
            weights: Array = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{job.data.weights}: cannot be read", got=str(error), expected="a .npy file") from error
    return weights


def evaluation_batches(dataset: Dataset, dtype: str, shares: Sequence[tuple[int, int]]) -> Iterator[Batch]:
    """Walk over a held-out set: of each batch, give this rank's shares in turn."""
    walks = [data.evaluation_batches(dataset, _EVALUATION_ROWS, *share, dtype=dtype) for share in shares]
    return chain.from_iterable(zip(*walks, strict=True))
