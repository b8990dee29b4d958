"""Where the threads of a `LocalWorld` meet: messages and collectives under way, and how all learn of a failure.

Every collective has a number on each rank.  Ranks deposit copies of what they contribute under that number; the last
one computes all results and wakes the others.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from mpitrain._errors import AbortError, CommunicationError, MismatchError, PeerError
from mpitrain._typing import Array
from mpitrain.comm.calls import Call
from mpitrain.comm.callsite import call_site
from mpitrain.comm.local_collectives import COLLECTIVES, unequal
from mpitrain.comm.tables import table

Group: TypeAlias = tuple[Any, ...]
"""Name of a communicator, the same on all its ranks: the parent's, the number of the split, the colour."""


@dataclass(eq=False)
class Post:
    """One side of a message: the call, what is sent, and whether it has met its other side."""

    call: Call
    payload: Array | None = None
    done: bool = False


@dataclass(eq=False)
class Slot:
    """One collective: what each rank called, by world rank, and what it contributed."""

    calls: dict[int, Call] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    sites: dict[int, str] = field(default_factory=dict)
    payloads: dict[int, Array | None] = field(default_factory=dict)
    done: bool = False


@dataclass(eq=False)
class Box:
    """Messages between two ranks with one tag, in order: those not yet received, and those not yet sent."""

    sent: deque[Post] = field(default_factory=deque)
    wanted: deque[Post] = field(default_factory=deque)


class Hub:
    """What the threads share, under one lock."""

    def __init__(self, size: int, rendezvous: bool, timeout_s: float) -> None:
        self.rendezvous = rendezvous
        self._size = size
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._slots: dict[tuple[Group, int], Slot] = {}
        self._boxes: defaultdict[tuple[Group, int, int, int], Box] = defaultdict(Box)
        self._failures: list[tuple[int, BaseException]] = []
        self._doing = dict.fromkeys(range(size), "computing")
        self._mismatch: str | None = None

    def fail(self, rank: int, error: BaseException) -> None:
        """Note that a rank failed, and wake all."""
        with self._changed:
            self._failures.append((rank, error))
            self._changed.notify_all()

    def leave(self, rank: int) -> None:
        """Note that a rank has returned; whoever waits for it will do so in vain."""
        with self._changed:
            self._doing[rank] = "returned"
            self._changed.notify_all()

    def raise_first(self) -> None:
        """Raise what the first rank to fail raised; what only followed from another rank's failure comes last."""
        ordered = sorted(self._failures, key=lambda each: isinstance(each[1], AbortError | PeerError))
        if ordered:
            rank, error = ordered[0]
            error.add_note(f"raised on rank {rank} of {self._size}")
            raise error

    def deposit(self, group: Group, number: int, members: tuple[int, ...], rank: int, name: str, call: Call) -> Slot:
        """Join a collective; complete it if this rank is the last."""
        site = call_site()
        payload = call.send if call.send is not None else call.recv
        with self._changed:
            slot = self._slots.setdefault((group, number), Slot())
            slot.calls[rank], slot.names[rank], slot.sites[rank] = call, name, site
            slot.payloads[rank] = None if payload is None else payload.copy()
            if len(slot.calls) == len(members):
                del self._slots[group, number]
                self._complete(slot, members)
                self._changed.notify_all()
        return slot

    def post(self, group: Group, source: int, dest: int, call: Call) -> Post:
        """Send or receive a message."""
        with self._changed:
            box = self._boxes[group, source, dest, call.tag]
            if call.send is not None:
                post = Post(call, call.send.copy(), done=not self.rendezvous)
                box.sent.append(post)
            else:
                post = Post(call)
                box.wanted.append(post)
            if box.sent and box.wanted:
                self._deliver(box.sent.popleft(), box.wanted.popleft())
                self._changed.notify_all()
        return post

    def wait(self, rank: int, name: str, item: Post | Slot, needs: Callable[[], set[int]]) -> None:
        """Block until a message or collective is complete, or cannot be any more."""
        deadline = time.monotonic() + self._timeout_s
        with self._changed:
            self._doing[rank] = name
            while not self.ready(item):
                gone = sorted(r for r in needs() if self._doing[r] == "returned")
                if gone:
                    raise MismatchError(f"{name} on rank {rank} waits for rank {gone[0]}, which has returned")
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise self._timed_out(rank, name)
                self._changed.wait(remaining)
            self._doing[rank] = "computing"

    def ready(self, item: Post | Slot) -> bool:
        """Tell whether a message or collective is complete; raise if the world has failed."""
        if self._mismatch is not None:
            raise MismatchError(self._mismatch)
        if item.done:
            return True
        if self._failures:
            rank, error = self._failures[0]
            raise AbortError(f"aborted, because rank {rank} failed: {type(error).__name__}: {error}")
        return False

    def _timed_out(self, rank: int, name: str) -> CommunicationError:
        doing = table({r: (what, "") for r, what in self._doing.items()})
        return CommunicationError(f"{name} on rank {rank} has waited for {self._timeout_s:g} s\n{doing}")

    def _complete(self, slot: Slot, members: tuple[int, ...]) -> None:
        calls = [slot.calls[rank] for rank in members]
        differ = "ranks called different collectives" if len(set(slot.names.values())) > 1 else unequal(calls, members)
        if differ:
            called = {rank: (name, f"at {slot.sites[rank]}") for rank, name in slot.names.items()}
            self._mismatch = f"{differ}\n{table(called)}"
            return
        payloads = [slot.payloads[rank] for rank in members]
        COLLECTIVES[calls[0].operation](calls, payloads)
        slot.done = True

    def _deliver(self, sent: Post, wanted: Post) -> None:
        assert sent.payload is not None
        assert wanted.call.recv is not None
        if (sent.call.dtype, sent.payload.size) != (wanted.call.dtype, wanted.call.recv.size):
            self._mismatch = f"sent and expected messages differ; sent: {sent.call}; expected: {wanted.call}"
            return
        wanted.call.recv[...] = sent.payload
        sent.done = wanted.done = True
