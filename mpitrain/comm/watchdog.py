"""Ends a job that waits in vain: a sleeping thread that sees when one of mpitrain's own calls takes too long.

A communicator tells it by a few stores a call (`Watch`); clocks are read by the thread alone.  What happens outside of
a call is never looked at, however long it takes.  A call that has waited longer than its timeout ends the job, after
the thread of every rank has printed the stacks of its process and told what it is doing.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakSet

from mpitrain import _env
from mpitrain._errors import CommunicationError, InputError
from mpitrain.comm import absence
from mpitrain.comm.callsite import call_site, in_communicator
from mpitrain.comm.tables import table

if TYPE_CHECKING:
    from mpitrain.comm.channel import Channel

DEFAULT_TIMEOUT_S = 600.0
DEBUG_TIMEOUT_S = 60.0
PATIENCE_S = 1.0
"""How long ranks that are asked what they do have to answer."""

_SHORTEST_NAP_S = 0.05
_DEBUG_NAP_S = 0.1
_LONGEST_NAP_S = 1.0
_NAPS = 20
"""Looks in the time of the shortest timeout."""

_STAGGER_S = 0.02
"""How much longer than the rank before it each rank waits before it ends the job, so that the first does it for all."""

_NAP_BEFORE_END_S = 0.2
"""Time for the launcher to take over what was printed."""

_ALARM_S = 5.0
"""How long a rank leaves ending the job to another that has begun to."""


class Watch:
    """What one communicator of this process is doing.

    A call stores itself in ``current`` while it lasts, and adds 1 to ``count`` when it ends.  Compiled code does
    neither; ``aside`` asks it.

    Parameters
    ----------
    axis : str
        Name of the communicator.
    channel : Channel, optional
        Private lines to the other ranks; a communicator without is not watched.
    chosen_s : float, optional
        The user's timeout; ``MPITRAIN_TIMEOUT_S`` if None, and without that the default.
    name : str
        Of the communicator, as its other ranks have it.
    members : sequence of int, optional
        Its ranks, as the channel numbers them.

    Attributes
    ----------
    current : object
        What has been called and has not returned; its ``str`` is shown.
    aside : callable, optional
        Returns the call that compiled code has under way, if any, and what tells it from the others.
    count : int
        Calls that have returned.
    checking : bool
        Debug mode is waiting for the other ranks, with a deadline of its own.
    debug : bool
        Debug mode is on.
    freed : bool
        The communicator cannot be used any more.
    heard : absence.Heard, optional
        What other ranks last said about a call that takes long.
    """

    def __init__(
        self, axis: str, channel: Channel | None = None, chosen_s: float | None = None, name: str = "",
        members: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.axis, self.channel, self.name, self.members = axis, channel, name, members
        given = _env.timeout_s()
        self.chosen_s = checked_timeout("MPITRAIN_TIMEOUT_S", given) if chosen_s is None and given else chosen_s
        self.current: object = None
        self.aside: Callable[[], tuple[object, int | str] | None] | None = None
        self.count = 0
        self.checking = self.debug = self.freed = False
        self.heard: absence.Heard | None = None
        self._seen: tuple[str | int, int | str] = (0, 0)
        self._since = 0.0
        if channel is not None:
            watchdog.add(self)

    @property
    def timeout_s(self) -> float:
        """Seconds that a call may wait; 0: for ever."""
        if self.chosen_s is not None:
            return self.chosen_s
        return DEBUG_TIMEOUT_S if self.debug else DEFAULT_TIMEOUT_S

    def check_open(self, operation: str) -> None:
        """Refuse an operation on a communicator that was freed."""
        if self.freed:
            raise CommunicationError("the communicator was freed", operation=operation)

    @contextmanager
    def during(self, what: object) -> Iterator[None]:
        """Take a block for a call; it may lie within another."""
        outer, self.current = self.current, what
        try:
            yield
        finally:
            self.current = outer
            self.count += 1

    def present(self) -> tuple[object, int | str]:
        """Return the present call, or None, and its number: among those that are stored, or among those aside."""
        found = self.aside() if self.current is None and self.aside is not None else None
        return found or (self.current, self.count)

    def waited_s(self, now: float) -> float:
        """Return for how long the thread, which asks again and again, has seen the present call."""
        what, number = self.present()
        # not the call: its arrays are the caller's to drop
        seen = id(what) if what is self.current else str(what), number
        if what is None or self.checking or self._seen != seen:
            self._seen, self._since = seen, now
        return now - self._since

    def overdue(self, now: float) -> bool:
        """Tell whether the present call has waited longer than it may."""
        return self.waited_s(now) > self.timeout_s > 0

    def __str__(self) -> str:
        what, _ = self.present()
        return f"{what}" if self.axis == "world" else f"{what} on {self.axis!r}"


def checked_timeout(name: str, value: object) -> float:
    """Return a timeout that a user gave, in seconds.

    Raises
    ------
    InputError
        It is no number, or negative.
    """
    try:
        found = float(value)  # type: ignore[arg-type]  # what cannot be converted is the user's error
    except (TypeError, ValueError):
        found = -1.0
    if not 0 <= found <= threading.TIMEOUT_MAX:
        raise InputError(f"{name} is not a time", got=repr(value), expected="seconds, or 0 to wait for ever")
    return found


class Watchdog:
    """Looks at all communicators of this process from a thread of its own, which starts with the first.

    Attributes
    ----------
    last : str
        In debug mode, the latest call of this process and where it was made.
    failed : str
        In debug mode, the call in which it failed, until one succeeds.
    """

    def __init__(self) -> None:
        self.last = self.failed = ""
        self._watches: WeakSet[Watch] = WeakSet()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def add(self, watch: Watch) -> None:
        """Watch a communicator from now on, and answer on its channel."""
        with self._lock:
            self._watches.add(watch)
            if self._thread is None and not self._stopping:
                self._thread = threading.Thread(target=self._run, name="mpitrain watchdog", daemon=True)
                self._thread.start()

    def nudge(self) -> None:
        """Look again now, since a timeout has changed."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread; nothing of MPI is called from it once this has returned."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def status(self) -> str:
        """Return what this process is doing."""
        frames = {ident: frame for ident, frame in sys._current_frames().items() if not self._is_own(ident)}
        watches = self._all()
        busy = " and ".join(str(watch) for watch in watches if watch.present()[0] is not None)
        if busy:
            found = f"in {busy} at {', '.join(call_site(f) for f in frames.values() if in_communicator(f))}"
            return found + (f", after it failed in {self.failed}" if self.failed else "")
        main = frames.get(threading.main_thread().ident or 0)
        found = "outside of communicators" + (f", at {call_site(main)}" if main else "")
        return found + (f"; its last call: {self.last}" if self.last else "")

    def waits(self, channel: Channel) -> list[absence.Wait]:
        """Return the calls that this process waits in, on communicators of a channel's family."""
        found = (absence.waiting(watch) for watch in self._all() if watch.channel is channel)
        return [each for each in found if each is not None]

    def stacks(self) -> str:
        """Return the stacks of all threads of this process but its own."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return "\n".join(
            f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sys._current_frames().items()
            if not self._is_own(ident)
        )

    def _all(self) -> list[Watch]:
        with self._lock:
            return list(self._watches)

    def _is_own(self, ident: int) -> bool:
        return self._thread is not None and ident == self._thread.ident

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(self._look())
            self._wake.clear()

    def _look(self) -> float:
        """Answer, end the job if a call is overdue, and return how long to sleep."""
        watches = self._all()
        for channel in {watch.channel for watch in watches if watch.channel is not None}:
            channel.answer()
        now = time.monotonic()
        late = next((watch for watch in watches if watch.overdue(now)), None)
        if late is not None:
            _end_job(late, now)
        for watch in watches:
            found = absence.find(watch, watch.waited_s(now))
            if found is not None:
                assert watch.channel is not None
                _end_with(watch.channel, found)
        if any(watch.debug for watch in watches):
            return _DEBUG_NAP_S
        shortest_s = min((watch.timeout_s for watch in watches if watch.timeout_s), default=_LONGEST_NAP_S * _NAPS)
        return min(max(shortest_s / _NAPS, _SHORTEST_NAP_S), _LONGEST_NAP_S)


watchdog = Watchdog()
"""That of this process."""


def _end_job(watch: Watch, now: float) -> None:
    """Tell on every rank what it was doing, then end them all; unless another rank is doing so."""
    channel = watch.channel
    assert channel is not None
    waited = f"{watch} has waited for {watch.waited_s(now):.1f} s, longer than timeout_s = {watch.timeout_s:g}"
    time.sleep(min(channel.rank * _STAGGER_S, PATIENCE_S))
    channel.answer()
    if time.monotonic() - channel.alarmed < _ALARM_S:
        return
    print_stacks(channel)
    rows = {channel.rank: (watchdog.status(), "")}
    others = [rank for rank in range(channel.size) if rank != channel.rank]
    rows |= {rank: (said, "") for rank, said in channel.inquire(others, PATIENCE_S, alarm=True).items()}
    _end_with(channel, f"error: {waited}; the job ends here\n{table(rows)}")


def _end_with(channel: Channel, text: str) -> None:
    say(channel, text)
    time.sleep(_NAP_BEFORE_END_S)
    channel.abort()


def print_stacks(channel: Channel) -> None:
    """Print what all threads of this process are doing."""
    say(channel, watchdog.stacks())


def say(channel: Channel, text: str) -> None:
    """Print lines that each tell the rank, since the launcher mixes those of all ranks."""
    lines = (f"[rank {channel.rank} of {channel.size}] {line}\n" for line in text.splitlines())
    sys.stderr.write("".join(lines))
    sys.stderr.flush()
