"""What one rank did and when: the calls of its communicators, and the phases that a program marks in between.

A communicator's `Watch` is told of every call that begins and ends, whichever way the call takes, since the watchdog
needs that.  Recording puts a class of its own behind the watches of a communicator and of all that are split from it,
so that nothing is paid, and nothing is different, while no trace is made.  Events are four integers each, written some
times a second to a file of this rank's in the Trace Event Format's array form, whose last bracket may be missing: it
can be read whatever ends the job.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import monotonic_ns
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO
from weakref import WeakKeyDictionary

from mpitrain._errors import StorageError
from mpitrain.comm.calls import Call, Prepared
from mpitrain.comm.callsite import nearest_line, shown
from mpitrain.comm.direct import Doing
from mpitrain.comm.request import Request
from mpitrain.comm.watchdog import Watch

if TYPE_CHECKING:
    from mpitrain.comm.engine import Engine

COMPUTE, COMMUNICATION = 0, 1
"""Rows of a rank: ``tid`` in the file."""

_WRITE_EVENTS = 4096
_WRITE_NS = 100_000_000
"""An abort by another rank loses at most this much and the call under way."""

_KINDS_MAX = 10_000


class Recorder:
    """Records what one rank does, between `attach` and `detach`.

    Parameters
    ----------
    rank : int
        Of this rank; the process number in the file.
    shift_ns : int
        What is added to this process's monotonic clock.
    max_events : int
        After so many, events are only counted.

    Attributes
    ----------
    dropped : int
        Events beyond ``max_events``, or that could not be written.
    failure : str
        Why writing stopped; empty while all is well.
    """

    def __init__(self, rank: int, shift_ns: int, max_events: int) -> None:
        self.rank, self.shift_ns, self.max_events = rank, shift_ns, max_events
        self.dropped, self.failure = 0, ""
        self._left = max_events
        self._rows: list[tuple[int, int, int, int]] = []  # kind, start, end, number of the request
        self._kinds: dict[Hashable, int] = {}
        self._tails: list[tuple[str, bool]] = []  # the constant part of an event, and whether it has a duration
        self._begun: WeakKeyDictionary[object, int] = WeakKeyDictionary()
        self._requests = 0
        self._file: TextIO | None = None
        self._written_ns = monotonic_ns()
        self._full_ns = 0

    # The communicators.

    def attach(self, comm: Engine) -> None:
        """Record the calls of a communicator and of all that are split from it, before and after."""
        comm._recorder = self
        vars(comm)["_start"] = partial(self._start, comm._start)
        watch = comm._watch
        vars(watch).update(recorder=self, comm=comm, under_way=[])
        watch.__class__ = _RecordedWatch
        comm._shorten()
        for part in comm._parts:
            self.attach(part)

    def detach(self, comm: Engine) -> None:
        """Leave a communicator and its parts as they were."""
        comm._recorder = None
        vars(comm).pop("_start", None)
        watch = comm._watch
        watch.__class__ = Watch
        for name in ("recorder", "comm", "under_way"):
            vars(watch).pop(name, None)
        comm._shorten()
        for part in comm._parts:
            self.detach(part)

    # Events.

    def phase(self, name: str) -> Phase:
        """Return a block that is shown in the row of computation."""
        return Phase(self, name)

    def add(self, kind: int, start_ns: int, end_ns: int, number: int = 0) -> None:
        """Keep an event."""
        if self._left <= 0:
            self.dropped += 1
            self._full_ns = self._full_ns or start_ns
            return
        self._left -= 1
        self._rows.append((kind, start_ns, end_ns, number))

    def kind(self, key: Hashable, event: Callable[[], dict[str, Any]]) -> int:
        """Return the number of a kind of events; ``event`` gives what they have in common when it is new."""
        found = self._kinds.get(key)
        if found is None:
            found = self._kinds[key] = len(self._tails)
            common = event()
            self._tails.append((f"{_json({**common, 'pid': self.rank})[1:]},\n", common["ph"] == "X"))
        return found

    def call(self, comm: Engine, what: object, start_ns: int, end_ns: int) -> None:
        """Keep a call that has returned; ``what`` is as its `Watch` was told."""
        if isinstance(what, Doing):
            what = what.prepared()
        line = nearest_line(sys._getframe(2))
        key = (comm, line, _signature(what))
        kind = self._kinds.get(key)
        if kind is None:
            kind = self.kind(key, partial(_slice, comm, what, line))
        self.add(kind, start_ns, end_ns)
        number = self._begun.pop(what, None) if self._begun else None
        if number is not None:
            assert isinstance(what, Prepared)
            operation = what.operation
            self.add(self.kind(("e", operation), lambda: _async("e", operation)), end_ns, end_ns, number)

    def _start(self, start: Callable[[Prepared], Request], prepared: Prepared) -> Request:
        """Begin a request, as the communicator would."""
        self.write_if_due()
        began = monotonic_ns()
        request = start(prepared)
        line, comm = nearest_line(sys._getframe(1)), start.__self__  # type: ignore[attr-defined]  # a bound method
        self._requests += 1
        self._begun[prepared] = self._requests
        key = ("b", comm, line, _signature(prepared))
        event = partial(_begun, comm, prepared, line)
        self.add(self.kind(key, event), began, began, self._requests)
        return request

    # The file.

    def open(self, path: Path) -> None:
        """Begin this rank's file.

        Raises
        ------
        StorageError
            It cannot be written.
        """
        try:
            self._file = path.open("w", encoding="ascii", buffering=1 << 16)
            self._file.write("[\n")
            self._file.write("".join(f"{_json(each)},\n" for each in self._names()))
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"{path}: {error.strerror or error}", operation="trace",
                remedy="name a file in a directory that every rank can write to",
            ) from error  # fmt: skip

    def write_if_due(self) -> None:
        """Write what has gathered, now and then; called where no time is being measured."""
        if not self._rows:
            return
        began = monotonic_ns()
        if began - self._written_ns > _WRITE_NS or len(self._rows) >= _WRITE_EVENTS:
            self._write()
            if self._left:
                kind = self.kind("write", lambda: _event("write trace", "trace", COMPUTE))
                self._rows.append((kind, began, monotonic_ns(), 0))

    def close(self) -> None:
        """Write the rest and end the file.  What a full disk refuses is lost, and counted."""
        if self._full_ns and self._file is not None:
            said = f"limit of {self.max_events} events reached"
            instant = {"ph": "i", "name": said, "cat": "trace", "s": "p", "tid": COMPUTE}
            self._rows.append((self.kind("full", lambda: instant), self._full_ns, self._full_ns, 0))
        self._write()
        self._close_file()

    def _write(self) -> None:
        tails, shift_ns = self._tails, self.shift_ns
        lines = []
        for kind, start_ns, end_ns, number in self._rows:
            tail, lasts = tails[kind]
            more = f'"dur":{(end_ns - start_ns) / 1e3:.3f}' if lasts else f'"id":"{self.rank}.{number}"'
            lines.append(f'{{"ts":{(start_ns + shift_ns) / 1e3:.3f},{more},{tail}')
        try:
            if self._file is not None:
                self._file.write("".join(lines))
                self._file.flush()
        except OSError as error:
            self.failure = str(error)
            self.dropped, self._left = self.dropped + len(lines), 0
            self._close_file()
        self._rows.clear()
        if len(self._kinds) > _KINDS_MAX:
            self._kinds.clear()
            self._tails.clear()
        self._written_ns = monotonic_ns()

    def _close_file(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # after a failure it tries once more
                self._file.close()
        self._file = None

    def _names(self) -> list[dict[str, Any]]:
        """Return the events that name this rank's rows."""
        rank = self.rank
        return [
            _name("process_name", rank, COMPUTE, {"name": f"rank {rank}"}),
            _name("process_labels", rank, COMPUTE, {"labels": socket.gethostname()}),
            _name("process_sort_index", rank, COMPUTE, {"sort_index": rank}),
            _name("thread_name", rank, COMPUTE, {"name": "compute"}),
            _name("thread_name", rank, COMMUNICATION, {"name": "communication"}),
            _name("thread_sort_index", rank, COMMUNICATION, {"sort_index": COMMUNICATION}),
        ]


class Phase:
    """A block of work, marked in a trace."""

    __slots__ = ("_began_ns", "_name", "_recorder")

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder, self._name = recorder, name

    def __enter__(self) -> None:
        self._recorder.write_if_due()
        self._began_ns = monotonic_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended, recorder, name = monotonic_ns(), self._recorder, self._name
        number = recorder.kind(("phase", name), lambda: _event(name, "phase", COMPUTE))
        recorder.add(number, self._began_ns, ended)


class _RecordedWatch(Watch):
    """A watch that tells a recorder what becomes current, and what no longer is."""

    recorder: Recorder
    comm: Engine
    under_way: list[tuple[object, int]]  # calls, the innermost last, and since when

    @property
    def current(self) -> object:
        return vars(self)["current"]

    @current.setter
    def current(self, what: object) -> None:
        vars(self)["current"] = what
        under_way = self.under_way
        if not under_way:
            if what is not None:
                self.recorder.write_if_due()
                under_way.append((what, monotonic_ns()))
            return
        if what is under_way[-1][0]:  # a plan in debug mode says so twice
            return
        now = monotonic_ns()
        if what is None or (len(under_way) > 1 and what is under_way[-2][0]):
            for _ in range(1 if what is not None else len(under_way)):
                self.recorder.call(self.comm, *under_way.pop(), now)
        else:
            under_way.append((what, now))


def _json(event: dict[str, Any]) -> str:
    return json.dumps(event, separators=(",", ":"))


def being_traced(comm: Engine) -> bool:
    """Tell whether the calls of a communicator, or of one that was split from it, are being recorded."""
    return comm._recorder is not None or any(map(being_traced, comm._parts))


def _signature(what: object) -> tuple[Hashable, ...]:
    """Return what tells kinds of calls apart, at little cost."""
    if not isinstance(what, Prepared):
        return (str(what),)
    found: list[Hashable] = [what.operation]
    for call in what.calls:
        send, recv = call.send, call.recv
        found += (
            None if send is None else send.size, None if recv is None else recv.size,
            call.dtype, call.op, call.root, call.peer, call.tag, call.algorithm,
        )  # fmt: skip
    return tuple(found)


def _slice(comm: Engine, what: object, line: tuple[str, int]) -> dict[str, Any]:
    """Return the event of a call: counted by the ledger, or the wait for a request, or neither."""
    if not isinstance(what, Prepared) or not what.calls:
        return _event(str(what), "setup", COMMUNICATION, _arguments(comm, what, line))
    waits = what.operation.startswith("i") or what.operation == "sendrecv"
    name, category = (f"wait {what.operation}", "wait") if waits else (what.operation, "comm")
    return _event(name, category, COMMUNICATION, _arguments(comm, what, line))


def _begun(comm: Engine, prepared: Prepared, line: tuple[str, int]) -> dict[str, Any]:
    return {**_async("b", prepared.operation), "args": _arguments(comm, prepared, line)}


def _async(form: str, name: str) -> dict[str, Any]:
    return {"ph": form, "name": name, "cat": "request", "tid": COMMUNICATION}


def _event(name: str, category: str, row: int, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "tid": row, "args": arguments or {}}


def _name(what: str, rank: int, row: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": row, "args": arguments}


def _arguments(comm: Engine, what: object, line: tuple[str, int]) -> dict[str, Any]:
    """Return what a person wants to know of a call."""
    found: dict[str, Any] = {"communicator": comm.ledger.axis, "ranks": comm.size}
    if isinstance(what, Prepared) and what.calls:
        found |= _common(what.calls)
        if comm._transport is not None and any(call.op for call in what.calls):
            found["transport"] = comm._transport.name
        if any(call.stream is not None for call in what.calls):
            found["device_transport"] = comm._device_way.name
    return {**found, "at": f"{shown(line[0])}:{line[1]}"}


def _common(calls: list[Call]) -> dict[str, Any]:
    """Return what is the same of all calls, and the sums of their sizes."""
    sized = [call for call in calls if call.dtype is not None]
    found: dict[str, Any] = {}
    if sized:
        found["dtype"] = " + ".join(dict.fromkeys(str(call.dtype) for call in sized))
        found["elements"] = sum(call.logical_bytes // (call.dtype.itemsize if call.dtype else 1) for call in sized)
        found["bytes"] = sum(call.logical_bytes for call in sized)
    for name in ("op", "root", "peer", "algorithm"):
        values = dict.fromkeys(getattr(call, name) for call in calls)
        values.pop(None, None)
        if values:
            found[name] = next(iter(values)) if len(values) == 1 else " + ".join(map(str, values))
    if "peer" in found:
        found["tag"] = calls[0].tag
    return found
