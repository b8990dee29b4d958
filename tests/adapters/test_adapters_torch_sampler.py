"""`DistributedSampler`: what it takes, and how it shares samples out."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch")

import mpitrain.torch as mt
from mpitrain._errors import InputError
from mpitrain.comm import LocalWorld


def test_a_sampler_needs_samples_for_every_rank():
    def rank(comm):
        with pytest.raises(InputError, match="got 1 samples; expected at least one sample for each of 2 ranks"):
            mt.DistributedSampler(1, comm, 1)
        for batch_size in (0, 2.5):
            with pytest.raises(InputError, match=f"DistributedSampler: batch_size is .*; got {batch_size}"):
                mt.DistributedSampler(5, comm, batch_size)

    LocalWorld(2).run(rank)


def test_a_sampler_takes_numbers_of_numpy():
    def rank(comm):
        ours, theirs = mt.DistributedSampler(np.int64(10), comm, np.int64(2)), mt.DistributedSampler(10, comm, 2)
        assert list(ours) == list(theirs)
        assert len(ours) == 3
        for unsized in (10.0, iter(range(10))):
            with pytest.raises(InputError, match=r"dataset is of another kind; got .*; expected a data set that has"):
                mt.DistributedSampler(unsized, comm, 2)

    LocalWorld(2).run(rank)


@pytest.mark.parametrize(
    ("rows", "batch_size", "sizes"),
    [(4, 1, [[1, 1, 2]]), (5, 1, [[1, 2, 2]]), (6, 1, [[1, 1, 1], [1, 1, 1]]), (5, 2, [[1, 2, 2]]),
     (7, 2, [[1, 1, 1], [1, 1, 2]]), (3, 8, [[1, 1, 1]])],
)  # fmt: skip
def test_sizes_of_batches(rows, batch_size, sizes):
    """Only batches of 1 are ever exceeded, rather than leave a rank without samples."""
    shares = LocalWorld(3).run(lambda comm: [len(each) for each in mt.DistributedSampler(rows, comm, batch_size)])
    assert [sorted(step) for step in zip(*shares, strict=True)] == sizes
