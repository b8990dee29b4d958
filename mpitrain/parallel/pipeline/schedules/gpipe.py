"""GPipe: all microbatches forward, then all backward."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain.parallel.pipeline.schedule import Family, Operation, Sizes


class GPipe(Family):
    """All forward, then all backward: the simplest, which keeps the activations of the whole batch.

    Notes
    -----
    Source: Y. Huang and others, "GPipe: efficient training of giant neural networks using pipeline parallelism",
    NeurIPS 2019, section 2.3; backward passes begin with the first microbatch, so that gradients are summed in the
    order of a serial run.
    """

    name = "gpipe"

    def order(self, sizes: Sizes, rank: int) -> Iterator[Operation]:
        """See `Family.order`."""
        for kind in ("F", "BW"):
            for microbatch in range(sizes.microbatches):
                yield Operation(kind, rank, microbatch)

    def peak(self, sizes: Sizes, rank: int) -> int:
        """Return m."""
        return sizes.microbatches

    def overhead(self, sizes: Sizes) -> Fraction:
        """Return (p − 1) / m."""
        return Fraction(sizes.ranks - 1, sizes.microbatches)
