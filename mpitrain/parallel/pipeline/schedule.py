"""What a pipeline schedule is: for each rank, the list of what it computes, in order.  Data, and nothing that runs.

A model is cut into ``ranks · chunks`` stages, a batch into microbatches.  Each stage computes each microbatch forward
and backward; a schedule says in which order a rank does so for its stages.  What is sent follows from it: outputs go to
the next stage, gradients to the one before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, NamedTuple

from mpitrain._errors import InputError

Kind = Literal["F", "B", "W", "BW"]
"""``F``: forward.  ``B``: the gradient of the stage's input, ``W``: those of its parameters, any time later.  ``BW``:
both at once."""


class Operation(NamedTuple):
    """One computation of one stage on one microbatch."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} of microbatch {self.microbatch} in stage {self.stage}"


@dataclass(frozen=True)
class Sizes:
    """The numbers that a schedule is made for.

    Parameters
    ----------
    ranks : int
        p, along the pipeline.
    chunks : int
        v, stages of each rank.
    microbatches : int
        m, of each batch.
    """

    ranks: int
    chunks: int
    microbatches: int

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < 1:
                raise InputError(f"{name} is too small", operation="schedule", got=size, expected="at least 1")

    @property
    def stages(self) -> int:
        """How many parts the model is cut into."""
        return self.ranks * self.chunks

    def rank_of(self, stage: int) -> int:
        """Return the rank that computes a stage: they go round, so that neighbours are on neighbouring ranks."""
        return stage % self.ranks

    def stages_of(self, rank: int) -> range:
        """Return the stages of a rank."""
        return range(rank, self.stages, self.ranks)

    @property
    def messages(self) -> int:
        """How many messages a step sends between ranks, over all of them: 2 (pv − 1) m."""
        return 2 * (self.stages - 1) * self.microbatches if self.ranks > 1 else 0


@dataclass(frozen=True)
class Schedule:
    """What each rank computes in a training step.

    Parameters
    ----------
    name : str
        Of its family.
    sizes : Sizes
        What it is made for.
    orders : tuple of tuple of Operation
        Of each rank.
    peaks : tuple of int
        The most forward passes of each rank that are in flight at a time: begun, and not yet done with the gradients of
        the parameters.  Their activations are kept.
    """

    name: str
    sizes: Sizes
    orders: tuple[tuple[Operation, ...], ...]
    peaks: tuple[int, ...]


class Family(ABC):
    """Makes the schedules of one kind, for any sizes."""

    name: ClassVar[str]

    def schedule(self, sizes: Sizes) -> Schedule:
        """Return the schedule for some sizes.

        Raises
        ------
        InputError
            There is none.
        """
        self.check(sizes)
        ranks = range(sizes.ranks)
        orders = tuple(tuple(self.order(sizes, rank)) for rank in ranks)
        return Schedule(self.name, sizes, orders, tuple(self.peak(sizes, rank) for rank in ranks))

    def check(self, sizes: Sizes) -> None:
        """Raise an InputError unless there is a schedule for these sizes."""
        if sizes.chunks != 1:
            raise InputError(
                "a rank has one stage in this schedule", operation=f"schedule {self.name!r}",
                got=f"chunks {sizes.chunks}", expected="1", remedy='take the schedule "interleaved"',
            )  # fmt: skip

    @abstractmethod
    def order(self, sizes: Sizes, rank: int) -> Iterator[Operation]:
        """Yield what a rank computes; of each stage, microbatches in ascending order."""

    @abstractmethod
    def peak(self, sizes: Sizes, rank: int) -> int:
        """Return the most forward passes of a rank that are in flight at a time, see `Schedule`."""

    @abstractmethod
    def overhead(self, sizes: Sizes) -> Fraction:
        """Return by what part a step takes longer than its work: (time − ideal) / ideal.

        Where each stage takes the same time, B and W each as long as F, and messages none.
        """
