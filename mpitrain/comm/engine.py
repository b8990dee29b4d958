"""What every communicator runs on: the hooks that a backend fills in, the guard, and the path of a call through them.

A public method checks its arguments and lays out its buffers (`mpitrain.comm.prepare`), counts itself in the ledger,
and hands contiguous host memory to the backend.  So a backend is a few methods, and all backends behave alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Self

from mpitrain._errors import CommunicationError
from mpitrain._typing import Array
from mpitrain.arrays.dtypes import accumulator
from mpitrain.comm import algorithms, prepare
from mpitrain.comm.buffers import wire
from mpitrain.comm.calls import Call, Handle, Prepared
from mpitrain.comm.ledger import Ledger
from mpitrain.comm.request import Request
from mpitrain.comm.transports.host import HostTransport
from mpitrain.comm.transports.transport import Transport
from mpitrain.comm.watchdog import Watch, checked_timeout, watchdog

if TYPE_CHECKING:
    from mpitrain.comm.algorithms.links import Links
    from mpitrain.comm.communicator import Communicator
    from mpitrain.comm.debug import Checker
    from mpitrain.comm.tuning import Table


class Engine(ABC):
    """One rank of a group: its backend, its guard, and how calls are performed."""

    library = ""
    _links: Links

    def __init__(self, rank: int, size: int, ledger: Ledger, watch: Watch | None = None) -> None:
        self.rank = rank
        self.size = size
        self.ledger = ledger
        self._watch = watch or Watch(ledger.axis)
        self._checker: Checker | None = None
        self._freed = False
        self._under_way: list[Handle] = []
        self._node: Communicator | None = None
        self._leaders: tuple[Communicator | None] | None = None
        self.tuning: Table | None = None
        self._transport: Transport | None = None

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

    def _reduce_from(self, call: Call) -> bool:
        """Perform an allreduce whose values are still elsewhere; False: this cannot be done, and nothing was done."""
        return False

    def _progress(self) -> None:
        """Let messages go on while this rank waits for something else; for a backend that needs to be called."""
        return

    def _choose_transport(self) -> Transport:
        """Return what reduces large arrays; called once, by all ranks.  A backend that has a better one says so."""
        return HostTransport()

    def _bind(self, values: Array, op: str) -> Callable[[], None]:
        """Return what reduces a flat array in place, over and over, checked already."""
        dtype = values.dtype
        if accumulator(dtype) != dtype:  # it travels in another type, through memory of its own each time
            again = partial(prepare.reduction, "allreduce_plan", self.size, values, op, values, None, True)
            return lambda: self._complete(again())
        call = Call("allreduce", dtype=dtype, recv=wire(values), op=op)
        return partial(self._run, call)

    def _moves(self) -> Transport:
        if self._transport is None:
            self._transport = self._choose_transport()
        return self._transport

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
        split from this communicator afterwards inherits it.
        """
        return self._checker is not None

    @debug.setter
    def debug(self, on: bool) -> None:
        self._checker = self._new_checker() if on else None
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

    # Life.

    def free(self) -> None:
        """Release the communicator once what is under way has completed; it cannot be used afterwards.  Collective."""
        if self._freed:
            return
        with self._together(Prepared("free()", [], lambda: None)):
            for handle in self._under_way:
                handle.wait()
            self._under_way.clear()
            self._freed = True
            if self._transport is not None:
                self._transport.free()
            self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:  # after an error the other ranks may never come here, and freeing would wait for them
            self.free()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, size={self.size}, axis={self.ledger.axis!r})"

    def _complete(self, prepared: Prepared, algorithm: str | None = None) -> Any:
        """Perform what was prepared and return its result."""
        self._check_open(prepared.operation)
        prepared = algorithms.assign(self, prepared, algorithm)
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

    def _perform(self, call: Call) -> None:
        if call.source is not None and call.algorithm is None and self._reduce_from(call):
            return
        call.load()
        if call.algorithm is None:
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

        What belongs to a request is kept here until it is complete, even if that is dropped: the backend still uses
        its buffers.
        """
        self._check_open(prepared.operation)
        self.ledger.record(prepared)
        meetings = self._checker.announce(prepared) if self._checker else ()
        handles = [self._begin(call) for call in prepared.calls]
        self._under_way = [each for each in self._under_way if not each.test()] + handles
        return Request(handles, prepared.finish, prepared, self._watch, meetings)

    def _check_open(self, operation: str) -> None:
        if self._freed:
            raise CommunicationError("the communicator was freed", operation=operation)
