"""ZB-H1: 1F1B with the gradients of the parameters put off to where a rank would wait."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain.parallel.pipeline.schedule import Family, Operation, Sizes


class ZeroBubbleH1(Family):
    """1F1B whose backward pass is split: the stage before waits for B alone, and W fills the gaps.

    Notes
    -----
    Rank r is r microbatches behind with W, so that every rank has as many microbatches in flight as the first one has
    in 1F1B, and no more.  With stages of equal cost the pipeline costs (p − 1)(F + B − W), where 1F1B costs
    (p − 1)(F + B + W).  Source: P. Qi, X. Wan, G. Huang, M. Lin, "Zero bubble pipeline parallelism", ICLR 2024
    (arXiv 2401.10241, 2023), section 2.1.
    """

    name = "zb-h1"

    def order(self, sizes: Sizes, rank: int) -> Iterator[Operation]:
        """See `Family.order`."""
        m, ahead = sizes.microbatches, min(sizes.ranks - rank, sizes.microbatches) - 1
        for microbatch in range(ahead):
            yield Operation("F", rank, microbatch)
        for microbatch in range(m):
            if microbatch + ahead < m:
                yield Operation("F", rank, microbatch + ahead)
            yield Operation("B", rank, microbatch)
            if microbatch >= rank:
                yield Operation("W", rank, microbatch - rank)
        for microbatch in range(max(m - rank, 0), m):
            yield Operation("W", rank, microbatch)

    def peak(self, sizes: Sizes, rank: int) -> int:
        """Return min(p, m)."""
        return min(sizes.ranks, sizes.microbatches)

    def overhead(self, sizes: Sizes) -> Fraction:
        """Return (p − 1) / (3 m), a third of 1F1B's; for m < p, where gaps stay, (p − 1 + p − m) / (3 m)."""
        p, m = sizes.ranks, sizes.microbatches
        return Fraction(p - 1 + max(p - m, 0), 3 * m)
