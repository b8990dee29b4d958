"""Which part of a step a rank spends in its communicator, told from a trace of some steps."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mpitrain.comm import Communicator
from mpitrain.comm.recorder import COMMUNICATION
from mpitrain.comm.tracing import trace
from mpitrain.train.bench.tasks import Steps

_STEP = "step"
"""The phase of `mpitrain.parallel.synchronous` that is a step."""


def communication_share(comm: Communicator, steps: Steps, count: int) -> float:
    """Return the time in calls of the communicator by that of the steps, over all ranks.  Collective.

    Parameters
    ----------
    comm : Communicator
        Of the method.
    steps : callable
        Takes steps of a method of ours.
    count : int
        How many to trace; they are not among those that are timed.
    """
    return float(comm.broadcast_object(share_of(traced(comm, steps, count))))


def traced(comm: Communicator, steps: Steps, count: int) -> list[dict[str, Any]]:
    """Return the events of some steps, on rank 0; elsewhere none.  Collective."""
    folder = tempfile.TemporaryDirectory(prefix="mpitrain-bench-") if comm.rank == 0 else None
    path = comm.broadcast_object(str(Path(folder.name) / "trace.json") if folder else "")
    with trace(path, comm):
        steps(count)
    if folder is None:
        return []
    with folder:
        found: list[dict[str, Any]] = json.loads(Path(path).read_bytes())["traceEvents"]
    return found


def share_of(events: Iterable[dict[str, Any]]) -> float:
    """Return the time of calls by that of the steps around them, from the events of a trace; 0 without steps."""
    slices = [each for each in events if each["ph"] == "X"]
    steps_us = sum(each["dur"] for each in slices if each["name"] == _STEP and each["cat"] == "phase")
    calls_us, ends_us = 0.0, dict[int, float]()
    for each in sorted(slices, key=lambda event: event["ts"]):
        if each["tid"] == COMMUNICATION and each["ts"] >= ends_us.get(each["pid"], -1.0):  # else within another call
            calls_us += each["dur"]
            ends_us[each["pid"]] = each["ts"] + each["dur"]
    return calls_us / steps_us if steps_us else 0.0
