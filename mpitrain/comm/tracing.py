"""One file with the timeline of all ranks: computation and communication, for chrome://tracing and ui.perfetto.dev.

Each rank records into a file of its own (`mpitrain.comm.recorder`).  At the end the clocks are compared a second time,
and rank 0 puts the parts together as they arrive, piece by piece.  What an error leaves are the parts.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain._errors import InputError, StorageError
from mpitrain.comm import clocks
from mpitrain.comm.calls import Prepared
from mpitrain.comm.clocks import Reading
from mpitrain.comm.communicator import Communicator
from mpitrain.comm.guard import agree
from mpitrain.comm.recorder import Recorder, being_traced

DEFAULT_MAX_EVENTS = 1_000_000
_PIECE_BYTES = 1 << 20


@contextmanager
def trace(
    path: str | PathLike[str],
    comm: Communicator,
    *,
    max_events: int = DEFAULT_MAX_EVENTS,
    on_note: Callable[[str], object] = warnings.warn,
) -> Iterator[None]:
    """Write the timeline of what the ranks do in the block to one file.

    Recorded are the calls of ``comm`` and of all communicators that were or will be split from it, and the blocks that
    `Communicator.phase` marks.

    Parameters
    ----------
    path : path
        The file, in the Trace Event Format (JSON), which chrome://tracing and ui.perfetto.dev open; overwritten.
        Rank 0's counts.
    comm : Communicator
        The ranks.
    max_events : int
        Of each rank, after which no more are kept; some 200 bytes each in the file.
    on_note : callable
        Told, on rank 0, if events are missing in the file.  Default: a warning.

    Raises
    ------
    InputError
        ``comm``, or a part of it, is being traced already.
    StorageError
        A rank cannot write its part, or rank 0 the file; on all ranks.

    Notes
    -----
    Collective at the start and at the end of the block, unless an exception leaves it: then each rank's part stays
    beside the file, as ``NAME.rank0.json`` and so on, and each can be opened by itself.

    Clocks are compared with rank 0's at the start and at the end (see `mpitrain.comm.clocks`), and times in between
    corrected linearly.  An event costs a few microseconds while it is traced.
    """
    _check(comm, max_events)
    with comm._together(Prepared("trace", [], lambda: None)):
        lines = comm._split(0, comm.rank, "trace")  # its own, so that its messages are not in the trace
    assert lines is not None
    target = Path(lines.broadcast_object(str(Path(path).resolve())))
    before = clocks.compare(lines)
    zero_ns = int(lines.broadcast(np.int64(before.local_ns)))
    recorder = Recorder(comm.rank, before.offset_ns - zero_ns, max_events)
    part = target.with_name(f"{target.stem}.rank{comm.rank}.json")
    _open(recorder, part, lines)
    recorder.attach(comm)
    try:
        yield
    finally:
        recorder.detach(comm)
        recorder.close()
    facts = _join(recorder, part, lines, before, target)
    part.unlink(missing_ok=True)
    lines.free()
    for note in _notes(target, facts):
        on_note(note)


def _check(comm: Communicator, max_events: int) -> None:
    if max_events < 1:
        raise InputError("max_events is too small", operation="trace", got=max_events, expected="at least 1")
    if being_traced(comm):
        raise InputError("is being traced already", operation="trace", got=repr(comm))


def _open(recorder: Recorder, part: Path, lines: Communicator) -> None:
    """Begin the files of all ranks, or of none.  Collective."""
    try:
        with agree(lines):
            recorder.open(part)
    except BaseException:
        recorder.close()
        part.unlink(missing_ok=True)
        raise


def _join(recorder: Recorder, part: Path, lines: Communicator, before: Reading, target: Path) -> list[dict[str, Any]]:
    """Put the parts of all ranks together; return, on rank 0, what each says of its own.  Collective."""
    after = clocks.compare(lines)
    own = {"rank": recorder.rank, "dropped": recorder.dropped, "failure": recorder.failure}
    facts = lines.gather_object({**own, "clock_start": asdict(before), "clock_end": asdict(after)}) or []
    with agree(lines):
        if lines.rank:
            _deliver(lines, _corrected(part, before, after))
        else:
            _write(target, _arriving(lines, part), facts)
    return facts


def _notes(target: Path, facts: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what a person must know of a trace that is not complete."""
    for each in facts:
        if each["dropped"]:
            why = each["failure"] or "the limit (max_events) was reached"
            yield f"{target}: {each['dropped']} events of rank {each['rank']} are missing: {why}"


def _write(target: Path, pieces: Iterator[bytes], facts: list[dict[str, Any]]) -> None:
    """Write the file, at once visible as a whole; the others' pieces are taken in whatever happens to it."""
    beside = target.with_name(f".{target.name}.writing")
    try:
        with beside.open("wb") as file:
            file.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')
            for piece in pieces:
                file.write(piece)
            file.write(_tail(facts))
        beside.replace(target)
    except OSError as error:
        for _ in pieces:
            continue
        beside.unlink(missing_ok=True)
        raise StorageError(
            f"{target}: {error.strerror or error}", operation="trace", remedy="the ranks' parts are beside it"
        ) from error


def _tail(facts: list[dict[str, Any]]) -> bytes:
    """Return the end of the file: an event without a comma after it, and how the trace was made."""
    last = {"ph": "M", "name": "process_sort_index", "pid": 0, "tid": 0, "args": {"sort_index": 0}}
    other = {"writer": "mpitrain", "time": "of rank 0's monotonic clock since the start of the trace", "ranks": facts}
    return f'{json.dumps(last)}\n],"otherData":{json.dumps(other)}}}\n'.encode()


def _arriving(lines: Communicator, part: Path) -> Iterator[bytes]:
    """Yield the pieces of the other ranks, one rank after the other, and then rank 0's."""
    for rank in range(1, lines.size):
        while piece := lines.recv_object(rank):
            yield piece
    yield from _corrected(part, Reading(0), Reading(1))


def _deliver(lines: Communicator, pieces: Iterator[bytes]) -> None:
    try:
        for piece in pieces:
            lines.send_object(piece, 0)
    finally:
        lines.send_object(b"", 0)


def _corrected(part: Path, before: Reading, after: Reading) -> Iterator[bytes]:
    """Yield a part in pieces, its times corrected for how the clock went between the two comparisons."""
    rate = 1 + (after.offset_ns - before.offset_ns) / max(after.local_ns - before.local_ns, 1)
    with part.open(encoding="ascii") as file:
        file.readline()  # the opening bracket
        while found := file.readlines(_PIECE_BYTES):
            whole = [line for line in found if line.endswith("},\n")]  # a full disk may have cut the last one
            yield "".join(whole if rate == 1 else [_stretched(line, rate) for line in whole]).encode()


def _stretched(line: str, rate: float) -> str:
    """Multiply the times of an event; ends stay behind what they were behind, to the nanosecond of the format."""
    if not line.startswith('{"ts":'):
        return line
    start, rest = line[6:].split(",", 1)
    begins_ns = round(float(start) * 1e3)
    moved_ns = round(begins_ns * rate)
    if rest.startswith('"dur":'):
        length, rest = rest[6:].split(",", 1)
        ends_ns = round((begins_ns + round(float(length) * 1e3)) * rate)
        rest = f'"dur":{(ends_ns - moved_ns) / 1e3:.3f},{rest}'
    return f'{{"ts":{moved_ns / 1e3:.3f},{rest}'
