"""Memory of the devices of a node that its ranks read from each other, without the host in between.

Each rank writes its own part, passes a fence, and reads all parts.  There are two of everything, used in turn, so that
one fence serves both ways: who writes to a half again has passed the fence of the other half since, and that one is
behind all that was read from the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from mpitrain._errors import CommunicationError
from mpitrain._typing import Array, DType
from mpitrain.arrays.devices import Stream

_HALVES = _BEACONS = 2
_OPEN: list[Window] = []
"""Those that were not closed: other processes may still read what is here when nobody here holds it any more."""


class Ranks(Protocol):
    """What a window needs of the ranks of a node."""

    rank: int

    def allgather_object(self, obj: Any) -> list[Any]:
        """Collect the objects of all ranks."""
        ...


class Window:
    """One rank's view of the memory that all share.

    Parameters
    ----------
    stream : Stream
        Any of this rank's device.
    ranks : Ranks
        They work on one device, or on several that can read each other's memory.
    barrier : callable
        Returns once all ranks have come there; for the host.
    nbytes : int
        Of a part, at most; the same on all ranks.

    Raises
    ------
    CommunicationError
        On all ranks: one cannot reach another's memory.

    Notes
    -----
    Collective, as are `turn`, `fence` and `close`.  Memory: twice ``nbytes`` on each device.  All work is queued on one
    stream; the host waits for other ranks to queue theirs, not for devices.
    """

    def __init__(self, stream: Stream, ranks: Ranks, barrier: Callable[[], None], nbytes: int) -> None:
        self.stream, self.nbytes = stream.fork(), nbytes
        self._rank, self._barrier = ranks.rank, barrier
        self._turn = self._fences = 0
        own, name = stream.share(_HALVES * nbytes)
        lit = [stream.beacon() for _ in range(_BEACONS)]
        names = ranks.allgather_object((name, [each for _, each in lit]))
        self._parts, problem = {self._rank: own}, ""
        try:
            for rank, (name, _) in enumerate(names):
                if rank != self._rank:
                    self._parts[rank] = stream.open(name, own.size)
        except CommunicationError as error:
            problem = str(error)
        found = next(filter(None, ranks.allgather_object(problem)), None)
        if found is not None:
            raise CommunicationError(found)
        self._lit = [beacon for beacon, _ in lit]
        self._sighted = [
            [stream.sight(each[turn]) for rank, (_, each) in enumerate(names) if rank != self._rank]
            for turn in range(_BEACONS)
        ]
        _OPEN.append(self)

    def turn(self) -> None:
        """Begin with the other half."""
        self._turn = 1 - self._turn

    def words(self, rank: int, begin: int, end: int, dtype: DType) -> Array:
        """Return elements of a rank's part of this half."""
        first = self._turn * self.nbytes
        return self._parts[rank][first + begin * dtype.itemsize : first + end * dtype.itemsize].view(dtype)

    def fence(self) -> None:
        """Put what is queued from now on behind all that all ranks have read and written so far."""
        turn = self._fences = (self._fences + 1) % _BEACONS
        self._lit[turn].light(self.stream)
        self._barrier()  # all have set theirs, and follow those of the last fence
        for beacon in self._sighted[turn]:
            beacon.follow(self.stream)

    def close(self) -> None:
        """Give the memory back, once no rank uses it any more."""
        self.stream.synchronize()
        self._barrier()
        own = self._parts.pop(self._rank)
        for part in self._parts.values():
            self.stream.close(part)
        self._parts.clear()
        self._barrier()  # all have let go of this rank's
        del own
        _OPEN.remove(self)
