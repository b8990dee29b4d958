"""When does each rank compute what?  The timeline of a schedule, from the costs of its operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpitrain.parallel.pipeline.schedule import Operation, Schedule
from mpitrain.parallel.pipeline.validator import dependencies

Time = Any
"""A number: integers and fractions give exact results."""


@dataclass(frozen=True)
class Costs:
    """How long operations take, in any one unit.

    Parameters
    ----------
    forward, backward_input, backward_weight : sequence of number
        F, B and W of each stage; BW takes as long as both.
    message : number
        From the end of an operation to when its result is on another rank.
    """

    forward: Sequence[Time]
    backward_input: Sequence[Time]
    backward_weight: Sequence[Time]
    message: Time = 0

    def of(self, operation: Operation) -> Time:
        """Return how long an operation takes."""
        stage = operation.stage
        by_part = {"F": self.forward, "B": self.backward_input, "W": self.backward_weight}
        return sum(by_part[part][stage] for part in operation.kind)


@dataclass(frozen=True)
class Span:
    """An operation and when it is computed."""

    operation: Operation
    start: Time
    stop: Time


@dataclass(frozen=True)
class Timeline:
    """When each rank computes what.

    Parameters
    ----------
    spans : tuple of tuple of Span
        Of each rank, in order.
    """

    spans: tuple[tuple[Span, ...], ...]

    @property
    def length(self) -> Time:
        """Time from the first operation to the end of the last."""
        return max(spans[-1].stop for spans in self.spans)

    @property
    def ideal(self) -> Time:
        """Time that the work would take if the ranks shared it evenly and never waited."""
        return self._busy / len(self.spans)

    @property
    def overhead(self) -> Time:
        """By what part it is longer than that: (length − ideal) / ideal."""
        return self.length / self.ideal - 1

    @property
    def idle(self) -> Time:
        """The part of the ranks' time in which they wait."""
        return 1 - self.ideal / self.length

    @property
    def _busy(self) -> Time:
        return sum(span.stop - span.start for spans in self.spans for span in spans)


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Return the timeline of a valid schedule.

    Parameters
    ----------
    schedule : Schedule
        What each rank computes.
    costs : Costs
        How long that takes.

    Notes
    -----
    Each rank begins an operation as soon as it is done with the one before and has what it needs.  Sending costs a rank
    no time.
    """
    needs, finished = dependencies(schedule), dict[Operation, Time]()
    spans: list[list[Span]] = [[] for _ in schedule.orders]
    to_come = [list(reversed(order)) for order in schedule.orders]
    while any(to_come):
        for rank, rest in enumerate(to_come):
            while rest and all(need in finished for need in needs[rest[-1]]):
                operation = rest.pop()
                ready = [_arrival(finished[need], need, rank, schedule, costs) for need in needs[operation]]
                start = max([*ready, spans[rank][-1].stop if spans[rank] else 0])
                finished[operation] = start + costs.of(operation)
                spans[rank].append(Span(operation, start, finished[operation]))
    return Timeline(tuple(map(tuple, spans)))


def _arrival(finished: Time, need: Operation, rank: int, schedule: Schedule, costs: Costs) -> Time:
    """Return when the result of another operation is on a rank."""
    return finished if schedule.sizes.rank_of(need.stage) == rank else finished + costs.message
