"""Reads trace files and holds them to the format, for the tests of the communicators and of the command line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

Event = dict[str, Any]
NESTING_SLACK_US = 0.0015  # times are written to the nanosecond


def read(path: Path) -> list[Event]:
    """Return the events of a whole trace, or of the part of one rank, which has no last bracket."""
    text = path.read_text()
    if text.startswith("["):
        return list(json.loads(text.rstrip().removesuffix(",") + "]"))
    return list(json.loads(text)["traceEvents"])


def check_format(events: list[Event], ranks: int) -> None:
    """Hold a file to the Trace Event Format, and the slices of each row to proper nesting."""
    assert {event["pid"] for event in events} == set(range(ranks))
    for event in events:
        assert event["ph"] in "XbeiM"
        assert isinstance(event["name"], str)
        assert isinstance(event["tid"], int)
        assert event["ph"] == "M" or event["ts"] >= 0
        assert event["ph"] != "X" or event["dur"] >= 0
    names = [(e["pid"], e["args"]["name"]) for e in events if e["name"] in ("process_name", "thread_name")]
    assert sorted(names) == sorted((r, n) for r in range(ranks) for n in (f"rank {r}", "compute", "communication"))
    for row in {(event["pid"], event["tid"]) for event in events}:
        check_nesting([e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == row])
    asyncs = [(e["id"], e["ph"], e["name"]) for e in events if e["ph"] in "be"]
    assert len(asyncs) == len(set(asyncs))
    assert {(i, n) for i, form, n in asyncs if form == "e"} <= {(i, n) for i, form, n in asyncs if form == "b"}


def check_nesting(slices: list[Event]) -> None:
    ends: list[float] = []
    for event in sorted(slices, key=lambda e: (e["ts"], -e["dur"])):
        while ends and ends[-1] <= event["ts"] + NESTING_SLACK_US:
            ends.pop()
        end = event["ts"] + event["dur"]
        assert not ends or end <= ends[-1] + NESTING_SLACK_US, event
        ends.append(end)


def told(events: list[Event], rank: int) -> Counter[tuple[str, str]]:
    """Count the events of a rank that stand for calls, as the ledger counts them."""
    calls = [e for e in events if e["pid"] == rank and (e["cat"] == "comm" if e["ph"] == "X" else e["ph"] == "b")]
    return Counter((e["args"]["communicator"], e["name"]) for e in calls)
