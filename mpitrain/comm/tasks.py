"""Task-parallel: independent calls of a function, handed to whichever rank is free.

mpi4py.futures hands them out (`Communicator._executor`), this file says what a task is, what becomes of one that fails,
and that rank 0 computes too.  It knows nothing of what the function does.
"""

from __future__ import annotations

import reprlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from mpitrain._errors import InputError, TaskError
from mpitrain._typing import Array
from mpitrain.comm import guard, objects
from mpitrain.comm.communicator import Communicator

_NAP_S = 0.5

_SWITCH_S = 1e-4
"""How soon the thread that hands out tasks gets the interpreter while rank 0 computes one in pure Python.

It needs that for every step of a message.  With Python's 5 ms, a second rank got 15 of 60 tasks of 20 ms; so, 27.
"""


@dataclass(frozen=True)
class Outcome:
    """What became of one task.

    Parameters
    ----------
    item : object
        What the function was called with.
    error : str or None
        Why it failed: the traceback, or the one line of an `MpitrainError`; None if it did not.
    rank : int
        That computed it.
    seconds : float
        Wall time of the call.
    """

    item: Any
    error: str | None
    rank: int
    seconds: float
    _value: Any = None

    @property
    def value(self) -> Any:
        """What the function returned.

        Raises
        ------
        TaskError
            It raised, or what it returned cannot be pickled: ``error`` says why.
        """
        if self.error is not None:
            raise TaskError(f"the task of item {reprlib.repr(self.item)} failed on rank {self.rank}: {self.error}")
        return self._value


def map_tasks(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    comm: Communicator,
    *,
    costs: Sequence[float] | None = None,
    on_outcome: Callable[[Outcome], object] | None = None,
) -> list[Outcome]:
    """Call a function on each of some items, on whichever rank is free, and give all outcomes to all ranks.

    Parameters
    ----------
    function : callable
        Called with an item, on one rank.  Each rank uses its own, so that it may be a lambda or a closure.  It must not
        communicate over ``comm``.
    items : iterable
        One per task; picklable.  Rank 0's count.
    comm : Communicator
        The ranks.
    costs : sequence of float, optional
        What each item will cost, in any unit: the dearest begin first.  Default: in the order of the items.  Rank 0's
        count.
    on_outcome : callable, optional
        Told each outcome on rank 0 as it completes, or, while rank 0 computes a task of its own, after that.

    Returns
    -------
    list of Outcome
        In the order of the items, and the same on all ranks.  A task that raised is an outcome too.

    Raises
    ------
    InputError
        An item cannot be pickled, or there is not one cost per item; `PeerError` on the other ranks, here and below.
    Exception
        What ``on_outcome`` raised; tasks that were not begun are dropped.

    Notes
    -----
    Collective.  Rank 0 hands out one task at a time and computes, itself, what nobody has begun.  A task costs a few
    milliseconds on top: worth it from some 20 ms on.  In a `LocalWorld`, whose ranks share one interpreter, rank 0
    computes all.  However long tasks take, the watchdog does not look.  A rank that dies ends the job: launchers see to
    that.
    """
    tasks: list[_Task] = []
    with guard.agree(comm):
        if comm.rank == 0:
            tasks = _ordered(list(items), costs)
    answers: dict[int, _Answer] = {}
    # The block communicates, as one of `agree` else must not: the others leave it when rank 0 does, by an error too.
    with guard.agree(comm), _serving(comm, function), _quick_switches(), comm._executor() as pool:
        for index, answer in _answers(pool, tasks):
            answers[index] = answer
            if on_outcome is not None:
                on_outcome(answer.outcome())
    return [answer.outcome() for _, answer in sorted(comm.broadcast_object(answers).items())]


@dataclass(frozen=True)
class _Task:
    """An item, pickled, and its place among the items."""

    index: int
    item: Array


@dataclass(frozen=True)
class _Answer:
    """What a rank sends back: the item and what the function returned, pickled, or why there is nothing."""

    item: Array
    value: Array | None
    error: str | None
    rank: int
    seconds: float

    def outcome(self) -> Outcome:
        value, error = None, self.error
        try:
            value = None if self.value is None else objects.load(self.value)
        except Exception as broken:  # what an object's own methods raise
            error = f"what it returned cannot be unpickled: {type(broken).__name__}: {broken}"
        return Outcome(objects.load(self.item), error, self.rank, self.seconds, value)


def _ordered(items: list[Any], costs: Sequence[float] | None) -> list[_Task]:
    """Return the tasks, those that will take longest first."""
    if costs is not None and len(costs) != len(items):
        raise InputError("not one cost per item", operation="map_tasks", got=len(costs), expected=len(items))
    tasks = [_Task(index, _pickled(f"item {index}", item)) for index, item in enumerate(items)]
    return tasks if costs is None else [tasks[i] for i in np.argsort(np.negative(costs), kind="stable")]


def _pickled(what: str, value: Any) -> Array:
    try:
        return objects.dump(value)
    except Exception as raised:  # pickle raises what the object's own methods raise
        error = raised.__cause__ or raised if isinstance(raised, InputError) else raised
        raise InputError(
            f"{what} cannot be sent between ranks: {type(error).__name__}: {error}", operation="map_tasks",
            got=type(value).__name__, remedy="hand over what it is made from, e.g. numbers, arrays or a path",
        ) from error  # fmt: skip


def _answers(pool: Executor | None, tasks: list[_Task]) -> Iterator[tuple[int, _Answer]]:
    """Yield what becomes of the tasks as they complete; compute here what can be taken back from the pool."""
    if pool is None:
        yield from ((task.index, _attempt(task.item)) for task in tasks)
        return
    completed: SimpleQueue[Future[_Answer]] = SimpleQueue()
    futures = {pool.submit(_attempt, task.item): task for task in tasks}
    for future in futures:
        future.add_done_callback(completed.put)
    not_begun, left = iter(futures), len(futures)
    try:
        while left:
            mine = next((future for future in not_begun if future.cancel()), None)
            if mine is not None:
                left -= 1
                yield futures[mine].index, _attempt(futures[mine].item)
            for future in _arrived(completed, wait=mine is None):
                left -= 1
                yield futures[future].index, future.result()
    finally:
        for future in futures:
            future.cancel()


def _arrived(completed: SimpleQueue[Future[_Answer]], wait: bool) -> Iterator[Future[_Answer]]:
    """Yield what the other ranks have completed; with ``wait``, at least one."""
    while wait or not completed.empty():
        with suppress(Empty):
            future = completed.get(timeout=_NAP_S)  # a signal may reach another thread, and is acted on by this one
            if not future.cancelled():
                wait = False
                yield future


@dataclass(frozen=True)
class _Service:
    """What this rank computes tasks with."""

    function: Callable[[Any], Any]
    comm: Communicator


_service: ContextVar[_Service] = ContextVar("service")


@contextmanager
def _serving(comm: Communicator, function: Callable[[Any], Any]) -> Iterator[None]:
    token = _service.set(_Service(function, comm))
    try:
        yield
    finally:
        _service.reset(token)


@contextmanager
def _quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _attempt(item: Array) -> _Answer:
    """Compute a task on this rank; what other ranks send is the name of this function, and the item."""
    service, value, error = _service.get(), None, None
    began = time.monotonic()
    try:
        with service.comm.phase("task"):
            found = service.function(objects.load(item))
        value = _pickled("what it returned", found)
    except (Exception, SystemExit) as failure:  # a task that calls sys.exit has failed, the rank has not
        error = guard.describe(failure).removeprefix("error: ")
    return _Answer(item, value, error, service.comm.rank, time.monotonic() - began)
