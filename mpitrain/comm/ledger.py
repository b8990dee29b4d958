"""Counts what a rank communicates: calls, messages and bytes, for each axis and operation."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass

from mpitrain.comm.calls import Prepared


@dataclass(frozen=True)
class Count:
    """Totals of one operation.

    Parameters
    ----------
    calls : int
        Uses of a public method.
    messages : int
        Primitive operations these came down to: one per dtype or bucket of a fused tree, one per array
        otherwise.
    logical_bytes : int
        Payload in the caller's dtypes: of each message, the larger of what this rank handed in and what it got.
    moved_messages, moved_bytes : int
        What this rank sent to others for it through `mpitrain.comm.algorithms`, in bytes on the wire.  A backend
        does not tell: what it performs itself counts nothing here.
    """

    calls: int = 0
    messages: int = 0
    logical_bytes: int = 0
    moved_messages: int = 0
    moved_bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.calls + other.calls,
            self.messages + other.messages,
            self.logical_bytes + other.logical_bytes,
            self.moved_messages + other.moved_messages,
            self.moved_bytes + other.moved_bytes,
        )


class Meter:
    """Counts the uses of something that costs the same each time, at the price of one addition."""

    __slots__ = ("each", "uses")

    def __init__(self, each: Count) -> None:
        self.each, self.uses = each, 0

    def total(self) -> Count:
        """Return the counts of all uses."""
        return Count(*(value * self.uses for value in astuple(self.each)))


class Ledger:
    """What one rank has communicated over a communicator and all that were split from it.

    Parameters
    ----------
    axis : str
        Name of the communicator whose entries this writes: ``"world"``, ``"node"``, ``"leaders"``, or the name that
        was given to `Communicator.split`.
    """

    def __init__(self, axis: str = "world") -> None:
        self.axis = axis
        self._counts: dict[tuple[str, str], Count] = {}
        self._meters: list[tuple[tuple[str, str], Meter]] = []
        self._tallies: dict[tuple[str, str], array[int]] = {}  # uses, and their bytes

    def child(self, axis: str) -> Ledger:
        """Return a ledger of the same totals that writes under another axis."""
        child = Ledger(axis)
        child._counts, child._meters, child._tallies = self._counts, self._meters, self._tallies
        return child

    def count(self, operation: str, nbytes: int) -> None:
        """Count one use of a public method that came down to one call of so many bytes."""
        tally = self.tally(operation)
        tally[0] += 1
        tally[1] += nbytes

    def tally(self, operation: str) -> array[int]:
        """Return where such uses are counted: how often, and how many bytes; for who counts by himself."""
        key = (self.axis, operation)
        found = self._tallies.get(key)
        if found is None:
            found = self._tallies[key] = array("q", (0, 0))
        return found

    def record(self, prepared: Prepared) -> None:
        """Count one use of a public method."""
        self._add(prepared.operation, _one_use(prepared))

    def moved(self, operation: str, messages: int, sent_bytes: int) -> None:
        """Count what this rank sent on the way of an operation."""
        self._add(operation, Count(moved_messages=messages, moved_bytes=sent_bytes))

    def meter(self, prepared: Prepared) -> Meter:
        """Return what counts further uses of the same public method with the same calls."""
        meter = Meter(_one_use(prepared))
        self._meters.append(((self.axis, prepared.operation), meter))
        return meter

    def snapshot(self) -> dict[tuple[str, str], Count]:
        """Return a copy of the totals by (axis, operation)."""
        counts = dict(self._counts)
        for key, meter in self._meters:
            if meter.uses:
                counts[key] = counts.get(key, Count()) + meter.total()
        for key, (uses, nbytes) in self._tallies.items():
            if not uses:
                continue
            counts[key] = counts.get(key, Count()) + Count(uses, uses, nbytes)
        return counts

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Forget what the block counts; it must call no plans, whose uses are kept."""
        counts, tallies = dict(self._counts), {key: tally[:] for key, tally in self._tallies.items()}
        try:
            yield
        finally:
            self._counts.clear()
            self._counts.update(counts)
            for key, tally in self._tallies.items():
                tally[:] = tallies.get(key, array("q", (0, 0)))

    def reset(self) -> None:
        """Forget all totals, of every axis."""
        self._counts.clear()
        for tally in self._tallies.values():
            tally[:] = array("q", (0, 0))
        for _, meter in self._meters:
            meter.uses = 0

    def _add(self, operation: str, used: Count) -> None:
        key = (self.axis, operation)
        self._counts[key] = self._counts.get(key, Count()) + used


def _one_use(prepared: Prepared) -> Count:
    return Count(1, len(prepared.calls), sum(call.logical_bytes for call in prepared.calls))
