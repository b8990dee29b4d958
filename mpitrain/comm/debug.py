"""Debug mode: ranks tell each other what they call before they run it, and none runs what the others did not call.

Every operation is described by a note: number, operation, dtype, shape, reduction, root, counts and call site.  The
ranks of a collective post theirs to each other, sender and receiver of a message likewise, and wait with a deadline for
those of the others.  So a mistake ends in one error on every rank, which lists what each called and where.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from mpitrain._errors import CommunicationError, MismatchError
from mpitrain._typing import Shape
from mpitrain.comm.buffers import accept
from mpitrain.comm.calls import Call, Prepared
from mpitrain.comm.callsite import call_site
from mpitrain.comm.tables import table
from mpitrain.comm.watchdog import PATIENCE_S, Watch, watchdog

if TYPE_CHECKING:
    from mpitrain.comm.channel import Channel

_MESSAGES = ("send", "isend", "recv", "irecv", "sendrecv", "send_object", "recv_object")
_EAGER_POLLS = 100
_POLL_S = 0.0005


@dataclass(frozen=True)
class Note:
    """What one rank calls.

    Parameters
    ----------
    text : str
        As it is shown.
    said : str
        What must be the same on all ranks.
    site : str
        Where it was called.
    gives, takes : sequence of int, optional
        Of a ragged ``alltoall``: elements for each rank, and from each.
    """

    text: str
    said: str
    site: str
    gives: Sequence[int] | None = None
    takes: Sequence[int] | None = None


class Checker:
    """Checks the calls of one rank of a communicator against those of the others.

    Parameters
    ----------
    channel : Channel
        Lines between the ranks.
    name : str
        Of the communicator; the same on its ranks, and no other of theirs has it.
    members : sequence of int
        Its ranks, as the channel numbers them.
    rank : int
        This rank.
    watch : Watch
        What says how long to wait.
    """

    def __init__(self, channel: Channel, name: str, members: Sequence[int], rank: int, watch: Watch) -> None:
        self.channel, self.members, self.rank, self.watch = channel, members, rank, watch
        self._name = name
        self._numbers: Counter[str] = Counter()
        self._inside = 0
        channel.checks = True

    def meet(self, prepared: Prepared) -> None:
        """Return once all ranks have called this.

        Raises
        ------
        MismatchError
            They have called different things.
        CommunicationError
            A rank has not come in time, or has ended.
        """
        for meeting in self.announce(prepared):
            meeting.wait()

    def announce(self, prepared: Prepared) -> list[Meeting]:
        """Tell the other ranks what this one calls; each message, or the collective, is then to be met on."""
        if not self.channel.open:
            return []
        site = call_site()
        watchdog.last = f"{prepared} at {site}"
        if prepared.operation in _MESSAGES:
            routes = [(call.operation, call.peer, call.tag) for call in prepared.calls if call.peer is not None]
            return [self._message(prepared, *route, site) for route in dict.fromkeys(routes)]
        return [self._collective(prepared, site)]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Check the collectives of the block, which are not the program's, but leave them out of what is shown."""
        before = self._numbers[self._name]
        try:
            yield
        finally:
            self._inside += self._numbers[self._name] - before

    def _collective(self, prepared: Prepared, site: str) -> Meeting:
        number = self._count(self._name)
        said = fingerprint(prepared)
        ragged = next((call for call in prepared.calls if call.recv_counts is not None), Call(""))
        pairs = f" gives {ragged.counts}, takes {ragged.recv_counts}" if ragged.counts else ""
        note = Note(f"#{number - self._inside} {said}{pairs}", said, site, ragged.counts, ragged.recv_counts)
        others = [rank for rank in range(len(self.members)) if rank != self.rank]
        key = f"{self._name} #{number}"
        self._post(others, key, note)
        return Meeting(self, prepared.operation, note, dict.fromkeys(others, key), "ranks called different collectives")

    def _message(self, prepared: Prepared, operation: str, peer: int, tag: int, site: str) -> Meeting:
        sends = operation == "send"
        source, dest = (self.rank, peer) if sends else (peer, self.rank)
        route = f"{self._name} {source}>{dest} tag {tag}"
        route = f"{route} #{self._count(f'{route} {operation}')}"
        calls = [call for call in prepared.calls if call.operation == operation]
        tree = prepared.tree[operation] if prepared.operation == "sendrecv" else prepared.tree
        said = " + ".join(str(call).removeprefix(operation) for call in calls) + shapes(tree)
        note = Note(f"{operation}{said}{calls[0].route}", said, site)
        self._post([peer], f"{route} {operation}", note)
        theirs = f"{route} {'recv' if sends else 'send'}"
        return Meeting(self, prepared.operation, note, {peer: theirs}, "the two sides of a message differ")

    def _count(self, what: str) -> int:
        self._numbers[what] += 1
        return self._numbers[what]

    def _post(self, ranks: Sequence[int], key: str, note: Note) -> None:
        self.channel.post([self.members[rank] for rank in ranks], key, asdict(note))


class Meeting:
    """The ranks that are to call one operation together, and what is known of them.

    Attributes
    ----------
    site : str
        Where this rank called it.
    """

    def __init__(self, checker: Checker, operation: str, own: Note, awaited: Mapping[int, str], differ: str) -> None:
        self._checker, self._operation = checker, operation
        self._awaited, self._differ = dict(awaited), differ
        self.site = own.site
        self._notes = {checker.rank: own}

    def test(self) -> bool:
        """Tell whether all have come.

        Raises
        ------
        MismatchError
            They have, and have called different things.
        """
        channel, members = self._checker.channel, self._checker.members
        channel.listen()
        for rank, key in list(self._awaited.items()):
            note = channel.take(members[rank], key)
            if note is not None:
                self._notes[rank] = Note(**note)
                del self._awaited[rank]
        if self._awaited:
            return False
        if not self._agree():
            raise self._mismatch()
        return True

    def wait(self) -> None:
        """Return once all have come; raise if they differ, or cannot come any more, or do not come in time."""
        watch = self._checker.watch
        watch.checking = True  # the watchdog leaves it to this
        try:
            self._poll(time.monotonic(), watch.timeout_s or float("inf"))
        except CommunicationError:
            own = self._notes[self._checker.rank]
            watchdog.failed = f"{own.text} at {own.site}"
            raise
        finally:
            watch.checking = False
        watchdog.failed = ""

    def _poll(self, start: float, timeout_s: float) -> None:
        polls = 0
        while not self.test():
            waited_s = time.monotonic() - start
            if not self._agree() and waited_s > min(PATIENCE_S, timeout_s):
                raise self._mismatch()  # the others' calls would make the list longer, not better
            if waited_s > timeout_s or self._left():
                raise self._absence(timeout_s)
            polls += 1
            time.sleep(_POLL_S if polls > _EAGER_POLLS else 0)

    def _agree(self) -> bool:
        notes = self._notes
        return len({note.said for note in notes.values()}) == 1 and all(
            notes[a].gives[b] == notes[b].takes[a]  # type: ignore[index]  # said tells that all have both
            for a, b in product(notes, notes)
            if notes[a].gives is not None
        )

    def _left(self) -> list[int]:
        return [rank for rank in self._awaited if self._checker.members[rank] in self._checker.channel.left]

    def _mismatch(self) -> MismatchError:
        return MismatchError(f"{self._differ}\n{self._table()}", operation=self._operation)

    def _absence(self, timeout_s: float) -> CommunicationError:
        missing = ", ".join(map(str, self._left() or self._awaited))
        why = "has left" if self._left() else f"has not come within {timeout_s:g} s"
        return CommunicationError(f"rank {missing} {why}\n{self._table()}", operation=self._operation)

    def _table(self) -> str:
        rows = {rank: (note.text, f"at {note.site}") for rank, note in self._notes.items()}
        members = self._checker.members
        if self._awaited:
            told = self._checker.channel.inquire([members[rank] for rank in self._awaited], PATIENCE_S)
            rows |= {rank: ("has not come", told[members[rank]]) for rank in self._awaited}
        return table(rows)


def fingerprint(prepared: Prepared) -> str:
    """Return what must be the same on all ranks of a collective."""
    ragged = any(call.counts is not None for call in prepared.calls)
    return f"{prepared}{shapes(prepared.tree, ragged)}"


def shapes(tree: Any, ragged: bool = False) -> str:
    """Return the structure of a tree and the shapes in it; without the number of rows, where ranks may differ in it."""
    if tree is None or (not isinstance(tree, (Mapping, list, tuple)) and len(_extents(tree)) == 1):
        return ""  # the number of elements says it
    return f" of {_shape(tree, ragged)}"


def _shape(tree: Any, ragged: bool) -> str:
    if isinstance(tree, Mapping):
        return f"{{{', '.join(f'{key!r}: {_shape(tree[key], ragged)}' for key in sorted(tree, key=repr))}}}"
    if isinstance(tree, list | tuple):
        return f"[{', '.join(_shape(child, ragged) for child in tree)}]"
    if tree is None:
        return "None"
    shape = _extents(tree)
    return str(("…", *shape[1:]) if ragged else shape).replace("'", "")


def _extents(leaf: Any) -> Shape:
    return accept("debug mode", leaf).shape
