"""Interleaved 1F1B: each rank has several stages from different places of the model."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain._errors import InputError
from mpitrain.parallel.pipeline.schedule import Family, Operation, Sizes


class Interleaved(Family):
    """1F1B over v smaller stages a rank: a v-th of the overhead, for v times the messages.

    Notes
    -----
    Microbatches pass in groups of p through the first stages of all ranks, then through the second ones, and so on.
    Source: D. Narayanan and others, "Efficient large-scale language model training on GPU clusters using Megatron-LM",
    SC 2021, section 2.2.2.
    """

    name = "interleaved"

    def check(self, sizes: Sizes) -> None:
        """Raise an InputError unless microbatches come in groups of p."""
        if sizes.microbatches % sizes.ranks:
            raise InputError(
                "microbatches do not divide by the ranks of the pipeline", operation=f"schedule {self.name!r}",
                got=f"{sizes.microbatches} microbatches, {sizes.ranks} ranks",
                expected=f"a multiple of {sizes.ranks}", remedy='or take the schedule "1f1b"',
            )  # fmt: skip

    def order(self, sizes: Sizes, rank: int) -> Iterator[Operation]:
        """See `Family.order`."""
        total, ahead = sizes.microbatches * sizes.chunks, self.peak(sizes, rank) - 1
        for number in range(ahead):
            yield _forward(sizes, rank, number)
        for number in range(total):
            if number + ahead < total:
                yield _forward(sizes, rank, number + ahead)
            yield _backward(sizes, rank, number)

    def peak(self, sizes: Sizes, rank: int) -> int:
        """Return min((v − 1) p + 2 (p − rank − 1) + 1, v m), counted in passes of one stage, a v-th of a rank's."""
        p, v = sizes.ranks, sizes.chunks
        return min((v - 1) * p + 2 * (p - rank - 1) + 1, v * sizes.microbatches)

    def overhead(self, sizes: Sizes) -> Fraction:
        """Return (p − 1) / (v m)."""
        return Fraction(sizes.ranks - 1, sizes.chunks * sizes.microbatches)


def _forward(sizes: Sizes, rank: int, number: int) -> Operation:
    """Return the forward pass that a rank computes as the ``number``-th."""
    chunk, microbatch = _place(sizes, number)
    return Operation("F", chunk * sizes.ranks + rank, microbatch)


def _backward(sizes: Sizes, rank: int, number: int) -> Operation:
    """Return the same for backward passes, which take the rank's last stage first."""
    chunk, microbatch = _place(sizes, number)
    return Operation("BW", (sizes.chunks - 1 - chunk) * sizes.ranks + rank, microbatch)


def _place(sizes: Sizes, number: int) -> tuple[int, int]:
    """Return chunk and microbatch of the ``number``-th pass."""
    group, rest = divmod(number, sizes.ranks * sizes.chunks)
    chunk, place = divmod(rest, sizes.ranks)
    return chunk, group * sizes.ranks + place
