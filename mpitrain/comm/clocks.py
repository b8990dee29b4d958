"""How far the ranks' clocks are apart: those of one node are usually one clock, those of two nodes never are."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic_ns

import numpy as np

from mpitrain._typing import Array
from mpitrain.comm.calls import Call, Prepared
from mpitrain.comm.engine import Engine

ROUNDS = 20
"""Round trips of which the quickest counts: the first ones open connections, others may be held up."""


@dataclass(frozen=True)
class Reading:
    """A rank's monotonic clock, compared with rank 0's.

    Parameters
    ----------
    local_ns : int
        When that was, on the rank's clock.
    offset_ns : int
        What must be added to it for rank 0's time.
    error_ns : int
        By how much that may be wrong: half the round trip.
    """

    local_ns: int
    offset_ns: int = 0
    error_ns: int = 0


def compare(comm: Engine) -> Reading:
    """Measure the offset of this rank's monotonic clock to rank 0's.

    Notes
    -----
    Collective.  Rank 0 answers one rank after the other, `ROUNDS` times each; the answer of the quickest round trip is
    taken to have been given at its middle (F. Cristian, "Probabilistic clock synchronization", Distributed Computing
    3, 1989).  2 `ROUNDS` (p−1) messages of 8 bytes, which no ledger counts.
    """
    with comm._together(Prepared("compare clocks", [], lambda: None)):
        if comm.rank:
            return min((_ask(comm) for _ in range(ROUNDS)), key=lambda reading: reading.error_ns)
        for rank in range(1, comm.size):
            for _ in range(ROUNDS):
                _move(comm, "recv", np.zeros(1, np.int64), rank)
                _move(comm, "send", np.array([monotonic_ns()], np.int64), rank)
        return Reading(monotonic_ns())


def _ask(comm: Engine) -> Reading:
    answer = np.zeros(1, np.int64)
    asked = monotonic_ns()
    _move(comm, "send", answer, 0)
    _move(comm, "recv", answer, 0)
    heard = monotonic_ns()
    middle = (asked + heard) // 2
    return Reading(middle, int(answer[0]) - middle, (heard - asked + 1) // 2)


def _move(comm: Engine, operation: str, values: Array, peer: int) -> None:
    send, recv = (values, None) if operation == "send" else (None, values)
    comm._run(Call(operation, dtype=values.dtype, send=send, recv=recv, peer=peer))
