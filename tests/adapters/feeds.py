"""A feed that gives each rank an uneven share, in uneven microbatches, whatever is trained on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpitrain.arrays import Batch

SHARES = {1: (10,), 2: (7, 3), 3: (5, 5, 0), 4: (1, 0, 6, 3)}
"""Samples of each rank, for so many ranks."""


def rows_of(rank: int, size: int) -> slice:
    start = sum(SHARES[size][:rank])
    return slice(start, start + SHARES[size][rank])


@dataclass(frozen=True)
class UnevenFeed:
    inputs: np.ndarray
    targets: np.ndarray

    def share(self, rank: int, size: int, microbatches: int) -> UnevenFeed.Share:
        rows = np.arange(len(self.inputs))[rows_of(rank, size)]
        return UnevenFeed.Share(self, np.split(rows, [len(rows) // 3]) if microbatches == 2 else [rows])

    @dataclass(frozen=True)
    class Share:
        feed: UnevenFeed
        parts: list[np.ndarray]

        def batch(self, step: int) -> list[Batch]:
            return [Batch(self.feed.inputs[rows], self.feed.targets[rows], rows) for rows in self.parts]
