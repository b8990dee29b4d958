"""Counts what a rank communicates: calls, messages and bytes, for each axis and operation."""

from __future__ import annotations

from dataclasses import dataclass

from mpitrain.comm.calls import Prepared


@dataclass(frozen=True)
class Count:
    """Totals of one operation.

    Parameters
    ----------
    calls : int
        Uses of a public method.
    messages : int
        Primitive operations these came down to: one per dtype of a fused tree, one per array otherwise.
    logical_bytes : int
        Payload in the caller's dtypes: of each message, the larger of what this rank handed in and what it got.
    """

    calls: int = 0
    messages: int = 0
    logical_bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.calls + other.calls, self.messages + other.messages, self.logical_bytes + other.logical_bytes
        )  # fmt: skip


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

    def child(self, axis: str) -> Ledger:
        """Return a ledger of the same totals that writes under another axis."""
        child = Ledger(axis)
        child._counts = self._counts
        return child

    def record(self, prepared: Prepared) -> None:
        """Count one use of a public method."""
        key = (self.axis, prepared.operation)
        used = Count(1, len(prepared.calls), sum(call.logical_bytes for call in prepared.calls))
        self._counts[key] = self._counts.get(key, Count()) + used

    def snapshot(self) -> dict[tuple[str, str], Count]:
        """Return a copy of the totals by (axis, operation)."""
        return dict(self._counts)

    def reset(self) -> None:
        """Forget all totals, of every axis."""
        self._counts.clear()
