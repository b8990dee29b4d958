"""1F1B: as soon as the pipeline is full, one forward, one backward."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain.parallel.pipeline.schedule import Family, Operation, Sizes


class OneFOneB(Family):
    """One forward, one backward: as long as GPipe, with no more microbatches in flight than there are stages to go.

    Notes
    -----
    Source: D. Narayanan and others, "PipeDream: generalized pipeline parallelism for DNN training", SOSP 2019, in the
    variant that ends each step with an empty pipeline (PipeDream-flush: "Memory-efficient pipeline-parallel DNN
    training", ICML 2021; D. Narayanan and others, "Efficient large-scale language model training on GPU clusters using
    Megatron-LM", SC 2021, section 2.2.1).
    """

    name = "1f1b"

    def order(self, sizes: Sizes, rank: int) -> Iterator[Operation]:
        """See `Family.order`."""
        m, ahead = sizes.microbatches, self.peak(sizes, rank) - 1
        for microbatch in range(ahead):
            yield Operation("F", rank, microbatch)
        for microbatch in range(m):
            if microbatch + ahead < m:
                yield Operation("F", rank, microbatch + ahead)
            yield Operation("BW", rank, microbatch)

    def peak(self, sizes: Sizes, rank: int) -> int:
        """Return min(p − rank, m)."""
        return min(sizes.ranks - rank, sizes.microbatches)

    def overhead(self, sizes: Sizes) -> Fraction:
        """Return (p − 1) / m."""
        return Fraction(sizes.ranks - 1, sizes.microbatches)
