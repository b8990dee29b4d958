"""Is a schedule right?  Complete, in order, free of deadlock, and within the memory that it promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from mpitrain._errors import InputError
from mpitrain.parallel.pipeline.schedule import Operation, Schedule

_PARTS: dict[str, tuple[str, ...]] = {"F": ("F",), "B": ("B",), "W": ("W",), "BW": ("B", "W")}


def validate(schedule: Schedule) -> None:
    """Check a schedule.

    Raises
    ------
    InputError
        An operation is missing, twice, on the wrong rank or out of order; ranks would wait for each other; or more
        passes are in flight than the schedule promises.

    Notes
    -----
    A rank is taken to block until what it receives is there, and never for what it sends: that is how the executor
    works.  Of each stage all passes take the microbatches in ascending order, so that the messages between two stages
    need no numbers, and gradients are summed in one order.
    """
    for rank in range(schedule.sizes.ranks):
        _check_complete(schedule, rank)
    _check_no_deadlock(schedule)
    for rank, (peak, promised) in enumerate(zip(peaks(schedule), schedule.peaks, strict=True)):
        if peak > promised:
            raise _wrong(schedule, f"rank {rank} has more passes in flight than promised", peak, promised)


def peaks(schedule: Schedule) -> tuple[int, ...]:
    """Return the most passes that each rank has in flight at a time: begun, and W not done."""
    found = []
    for order in schedule.orders:
        in_flight = peak = 0
        for operation in order:
            in_flight += operation.kind == "F"
            peak = max(peak, in_flight)
            in_flight -= "W" in operation.kind
        found.append(peak)
    return tuple(found)


def dependencies(schedule: Schedule) -> dict[Operation, list[Operation]]:
    """Return for each operation those of any rank that must be done before it can begin, the rank's order aside.

    Operations are named as they stand in the schedule.
    """
    by_part = {
        (part, operation.stage, operation.microbatch): operation
        for order in schedule.orders
        for operation in order
        for part in _PARTS[operation.kind]
    }
    last = schedule.sizes.stages - 1
    return {
        operation: [by_part[each] for each in _needs(operation, last)]
        for order in schedule.orders
        for operation in order
    }


def _needs(operation: Operation, last: int) -> Iterator[tuple[str, int, int]]:
    kind, stage, microbatch = operation
    if kind == "F" and stage > 0:
        yield "F", stage - 1, microbatch
    if kind in ("B", "BW"):
        yield ("B", stage + 1, microbatch) if stage < last else ("F", stage, microbatch)
    if kind == "W":
        yield "B", stage, microbatch


def _check_complete(schedule: Schedule, rank: int) -> None:
    """Require that each stage does F, B and W of each microbatch once, in this order, and microbatches ascending."""
    sizes, parts = schedule.sizes, ("F", "B", "W")
    done: Counter[tuple[str, int]] = Counter()  # microbatches behind each part of each stage
    for operation in schedule.orders[rank]:
        if operation.stage not in sizes.stages_of(rank):
            raise _wrong(schedule, f"rank {rank} does not have the stage", operation, list(sizes.stages_of(rank)))
        for part in _PARTS[operation.kind]:
            before = parts[max(parts.index(part) - 1, 0)]
            if done[part, operation.stage] != operation.microbatch or (
                part != before and done[before, operation.stage] <= operation.microbatch
            ):
                raise _wrong(schedule, f"rank {rank}: an operation is out of order", operation, "F, B, W; ascending")
            done[part, operation.stage] += 1
    for stage in sizes.stages_of(rank):
        for part in parts:
            if done[part, stage] != sizes.microbatches:
                what = f"rank {rank}, stage {stage}: {part} is not complete"
                raise _wrong(schedule, what, f"{done[part, stage]} microbatches", sizes.microbatches)


def _check_no_deadlock(schedule: Schedule) -> None:
    """Require an order of all operations that respects every rank's and every message."""
    graph = dependencies(schedule)
    for order in schedule.orders:
        for before, after in pairwise(order):
            graph[after].append(before)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = " waits for ".join(str(operation) for operation in reversed(error.args[1]))
        raise _wrong(schedule, "ranks would wait for each other", circle, "no circle") from error


def _wrong(schedule: Schedule, what: str, got: object, expected: object) -> InputError:
    return InputError(what, operation=f"schedule {schedule.name!r}", got=str(got), expected=str(expected))
