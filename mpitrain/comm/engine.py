"""What every communicator runs on: the hooks that a backend fills in, the guard, and the path of a call through them.

A public method checks its arguments and lays out its buffers (`mpitrain.comm.prepare`), counts itself in the ledger,
and hands contiguous host memory to the backend; memory of a device goes to a transport for it, which does that or more.
So a backend is a few methods, and all backends behave alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Self
from weakref import WeakSet

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays.dtypes import accumulator
from mpitrain.comm import algorithms, prepare
from mpitrain.comm.buffers import wire
from mpitrain.comm.calls import Call, Handle, Prepared
from mpitrain.comm.ledger import Ledger
from mpitrain.comm.request import Request
from mpitrain.comm.transports.device import DeviceTransport
from mpitrain.comm.transports.device_choice import BETWEEN_THREADS, Way
from mpitrain.comm.transports.entry import Entry, calling
from mpitrain.comm.transports.host import HostTransport
from mpitrain.comm.transports.transport import Planned, Transport
from mpitrain.comm.watchdog import Watch, checked_timeout, watchdog

if TYPE_CHECKING:
    from mpitrain.comm.algorithms.links import Links
    from mpitrain.comm.communicator import Communicator
    from mpitrain.comm.debug import Checker
    from mpitrain.comm.recorder import Recorder
    from mpitrain.comm.tuning import Table


_UNMARKED = nullcontext()


class Engine(ABC):
    """One rank of a group: its backend, its guard, and how calls are performed.

    Names that begin with an underscore are for the files of `mpitrain.comm`; programs see the other ones.
    """

    library = ""
    _links: Links

    def __init__(self, rank: int, size: int, ledger: Ledger, watch: Watch | None = None) -> None:
        self.rank = rank
        self.size = size
        self.ledger = ledger
        self._watch = watch or Watch(ledger.axis)
        self._checker: Checker | None = None
        self._under_way: list[Handle] = []
        self._node: Communicator | None = None
        self._leaders: tuple[Communicator | None] | None = None
        self._made: list[Communicator] = []
        self._transport: Transport | None = None
        self._device_way: Way = BETWEEN_THREADS.among(size)
        self._devices: DeviceTransport | None = None
        self._parts: WeakSet[Engine] = WeakSet()
        self._recorder: Recorder | None = None
        self._tuning: Table | None = None
        self._entry: Entry | None = None
        self._entries: list[Entry] = []  # plans go on using those of before
        self._watch.aside = partial(calling, self._entries, size)

    # What a backend fills in.

    @abstractmethod
    def _run(self, call: Call) -> None:
        """Perform a call; return when this rank's memory may be used again."""

    @abstractmethod
    def _begin(self, call: Call) -> Handle:
        """Begin a call."""

    @abstractmethod
    def _split(self, color: int | None, key: int, axis: str) -> Communicator | None:
        """Return the communicator of the ranks of this colour, ordered by key and then rank."""

    @abstractmethod
    def _split_node(self) -> Communicator:
        """Return the communicator of the ranks that share memory with this one."""

    @abstractmethod
    def abort(self, code: int = 1) -> NoReturn:
        """End all ranks of the job at once, with this exit code."""

    @abstractmethod
    def _free(self) -> None:
        """Release what the backend holds."""

    def _open(self) -> Entry | None:
        """Return the shortest way of plain calls, for a backend that has one; the transport may not be chosen yet."""
        return None

    def _progress(self) -> None:
        """Let messages go on while this rank waits for something else; for a backend that needs to be called."""
        return

    def _choose_transport(self) -> Transport:
        """Return what reduces large arrays; called once, by all ranks.  A backend that has a better one says so."""
        return HostTransport()

    def _bind(self, send: Array, recv: Array, op: str) -> Planned:
        """Lay out a reduction of a flat array into another, or in place, checked already."""
        dtype = recv.dtype
        if accumulator(dtype) != dtype:  # it travels in another type, through memory of its own each time
            again = partial(prepare.reduction, "allreduce_plan", self.size, send, op, recv, None, True)
            return Planned(lambda: self._complete(again()), recv)
        words = wire(recv)
        return Planned(partial(self._allreduce_now, words if send is recv else wire(send), words, op), recv)

    def _allreduce_now(self, send: Array, recv: Array, op: str) -> None:
        """Reduce a contiguous array into another, or in place, checked already, of a type that is reduced as it is."""
        if send is not recv:
            np.copyto(recv, send)
        self._run(Call("allreduce", recv.dtype, recv=wire(recv), op=op))

    def _reduce_now(self, send: Array, recv: Array, op: str, root: int) -> None:
        """Reduce a contiguous array for the root, as `_allreduce_now`; elsewhere nothing is written to ``recv``."""
        words = wire(recv if self.rank == root else send.copy())
        if self.rank == root and send is not recv:
            np.copyto(recv, send)
        self._run(Call("reduce", recv.dtype, recv=words, op=op, root=root))

    def _broadcast_now(self, values: Array, root: int) -> None:
        """Broadcast one contiguous array in place, checked already, of a type that travels as it is."""
        self._run(Call("broadcast", values.dtype, recv=wire(values), root=root))

    def _reduce_scatter_now(self, send: Array, recv: Array, op: str) -> None:
        """Reduce the rows of a contiguous array, one for each rank, as `_allreduce_now`."""
        self._run(Call("reduce_scatter", recv.dtype, wire(send), wire(recv), op))

    def _allgather_now(self, send: Array, recv: Array) -> None:
        """Collect contiguous arrays of all ranks, as `_broadcast_now`."""
        self._run(Call("allgather", recv.dtype, wire(send), wire(recv)))

    @property
    def plain(self) -> bool:
        """Whether calls may take the short way (`mpitrain.comm.direct`): nothing looks at each of them."""
        return self._checker is None and self._tuning is None and not self._watch.freed

    @property
    def tuning(self) -> Table | None:
        """Chooses the algorithm of a call that names none; None: the backend's own way.  The same on all ranks."""
        return self._tuning

    @tuning.setter
    def tuning(self, table: Table | None) -> None:
        self._tuning = table
        self._shorten()

    def _keep(self, made: Communicator | None) -> None:
        """Free a communicator, if this rank is in it, with this one."""
        if made is not None:
            self._made.append(made)

    def _moves(self) -> Transport:
        """Return the transport, which is chosen at the first use.  Collective then."""
        found = self._transport
        if found is None:
            with self._aside():
                found = self._choose_transport()
            self._use(found)
        return found

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Leave what the block communicates out of what is counted and shown, for it is not the program's."""
        with self.ledger.unchanged(), self._checker.inside() if self._checker else nullcontext():
            yield

    def _use(self, transport: Transport) -> None:
        """Reduce by a transport from now on; all ranks do so."""
        self._transport = transport
        self._shorten()

    def _device_moves(self) -> DeviceTransport:
        """Return the transport of device memory, which is made at the first use.  Communicates nothing."""
        if self._devices is None:
            self._devices = self._device_way.transport(self._links.comm)
        return self._devices

    def _shorten(self) -> None:
        """Open the shortest way of plain calls anew, or close it, after something that it depends on has changed."""
        self._entry = made = self._open() if self.plain and self._recorder is None else None
        if made is not None:
            self._entries.append(made)

    def _meet(self, call: Call) -> None:
        """Refuse a call of one of our own algorithms that other ranks perform otherwise, where that can be told."""
        return

    def _new_checker(self) -> Checker | None:
        """Return what checks calls in debug mode; None for a backend that always does."""
        return None

    # Guard.

    @property
    def debug(self) -> bool:
        """Whether every call is checked against those of the other ranks before it runs.

        Set it on all ranks at the same point of the program; ``MPITRAIN_DEBUG=1`` sets it from the start.  What is
        split from this communicator afterwards inherits it, and so does what `allreduce_plan` returns afterwards: plans
        made before are not checked.
        """
        return self._checker is not None

    @debug.setter
    def debug(self, on: bool) -> None:
        self._checker = self._new_checker() if on else None
        self._shorten()
        self._watch.debug = self.debug
        watchdog.nudge()

    @property
    def timeout_s(self) -> float:
        """Seconds that a call may wait for other ranks; 0: for ever.

        After that it raises in debug mode; without, the watchdog ends the job.  600 by default, 60 in debug mode, else
        what ``MPITRAIN_TIMEOUT_S`` says.  What is split from this communicator afterwards inherits it.
        """
        return self._watch.timeout_s

    @timeout_s.setter
    def timeout_s(self, value: float) -> None:
        self._watch.chosen_s = checked_timeout("timeout_s", value)
        watchdog.nudge()

    # Tracing.

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Mark a block of work of this rank's in the trace, if one is being made; else do nothing.  Local.

        Parameters
        ----------
        name : str
            What is shown; one of a few, as ``"forward"``.
        """
        return _UNMARKED if self._recorder is None else self._recorder.phase(name)

    def _include(self, part: Communicator) -> None:
        """Take note of a communicator that was split from this one, which a trace of this one includes."""
        self._parts.add(part)
        if self._recorder is not None:
            self._recorder.attach(part)

    # Life.

    def free(self) -> None:
        """Release the communicator once what is under way has completed; it cannot be used afterwards.  Collective.

        What it made for itself (`node`, `leaders`, those of its algorithms and its transport) goes with it, what was
        split from it does not.
        """
        if self._watch.freed:
            return
        with self._together(Prepared("free()", [], lambda: None)):
            for handle in self._under_way:
                handle.wait()
            self._under_way.clear()
            if self._devices is not None:
                self._devices.release()
                self._devices = None  # and its page-locked memory
            for made in reversed(self._made):
                made.free()
            self._watch.freed = True
            self._shorten()
            for entry in self._entries:
                entry.close()
            self._entries.clear()
            self._leave_transport()
            self._free()

    def _leave_transport(self) -> None:
        """Give the transport's memory back; its name can still be asked for."""
        left = self._transport
        if left is not None:
            self._transport = named = HostTransport()
            named.name, named.why = left.name, left.why
            left.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:  # after an error the other ranks may never come here, and freeing would wait for them
            self.free()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, size={self.size}, axis={self.ledger.axis!r})"

    def _complete(self, prepared: Prepared, algorithm: str | None = None) -> Any:
        """Perform what was prepared and return its result."""
        self._watch.check_open(prepared.operation)
        prepared = self._assign(algorithms.assign(self, prepared, algorithm))
        self.ledger.record(prepared)
        watch = self._watch
        outer, watch.current = watch.current, prepared
        try:
            if self._checker is not None:
                self._checker.meet(prepared)
            for call in prepared.calls:
                self._perform(call)
        finally:
            watch.current = outer
            watch.count += 1
        return prepared.finish()

    def _assign(self, prepared: Prepared) -> Prepared:
        """Say how calls on memory of a device are to be performed."""
        if all(call.stream is None for call in prepared.calls):
            return prepared
        moves = self._device_moves()
        return replace(prepared, calls=[call if call.stream is None else moves.assign(call) for call in prepared.calls])

    def _perform(self, call: Call) -> None:
        if call.stream is not None:
            self._device_moves().run(call)
        elif call.algorithm is None:
            self._run(call)
        else:
            algorithms.perform(self, call)

    @contextmanager
    def _together(self, prepared: Prepared) -> Iterator[None]:
        """Do in the block what is collective without being a call of the backend's."""
        with self._watch.during(prepared):
            if self._checker is not None:
                self._checker.meet(prepared)
            yield

    def _start(self, prepared: Prepared) -> Request:
        """Begin what was prepared.

        What was begun is kept here until it is complete, even if the request is dropped or a later part of it cannot
        be begun: the backend still uses its buffers.
        """
        self._watch.check_open(prepared.operation)
        self.ledger.record(prepared)
        meetings = self._checker.announce(prepared) if self._checker else ()
        self._under_way = [each for each in self._under_way if not each.test()]
        handles: list[Handle] = []
        for call in prepared.calls:
            handles.append(self._begin(call) if call.stream is None else self._device_moves().begin(call))
            self._under_way.append(handles[-1])
        return Request(handles, prepared.finish, prepared, self._watch, meetings)
