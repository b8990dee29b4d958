"""Memory of the devices of a node that its ranks read from each other, without the host in between.

Each rank writes its own part, passes a fence, and reads all parts.  There are two of everything, used in turn, so that
one fence serves both ways: who writes to a half again has passed the fence of the other half since, and that one is
behind all that was read from the first.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING

from mpitrain._typing import Array, DType
from mpitrain.arrays.devices import Beacon, Stream
from mpitrain.comm.calls import Call
from mpitrain.comm.guard import agree

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

_HALVES = 2
_BEACONS = 2  # in turn too, but by the fences, of which there may be two between one half and the other
_OPEN: list[Window] = []
"""Those that were not closed: other processes may still read what is here when nobody here holds it any more."""


class Window:
    """One rank's view of the memory that all share.

    Parameters
    ----------
    stream : Stream
        Any of this rank's device.
    comm : Communicator
        For the meetings of the window's ranks, and nothing else.  They work on one device, or on several that can read
        each other's memory.
    nbytes : int
        Of a part, at most; the same on all ranks.

    Raises
    ------
    CommunicationError, PeerError
        On all ranks: one cannot share its memory, or reach another's.

    Notes
    -----
    Collective, as are `fence` and `close`; `turn` must be called alike.  Memory: twice ``nbytes`` on each device.  All
    work is queued on one stream; the host waits for other ranks to queue theirs, not for devices.
    """

    def __init__(self, stream: Stream, comm: Communicator, nbytes: int) -> None:
        self.stream, self.nbytes = stream.fork(), nbytes
        self._comm = comm
        self._turn = self._fences = 0
        self._parts: dict[int, Array] = {}
        self._lit: list[Beacon] = []
        self._sighted: list[list[Beacon]] = [[] for _ in range(_BEACONS)]
        _OPEN.append(self)
        _settle_at_exit()
        try:
            with agree(comm):
                names = self._offer()
            offered = comm.allgather_object(names)
            with agree(comm):
                self._open(offered)
        except Exception:  # on all ranks
            self.close()
            raise

    def _offer(self) -> tuple[bytes, list[bytes]]:
        """Make this rank's part and beacons; return by which names they are found."""
        self._parts[self._comm.rank], name = self.stream.share(_HALVES * self.nbytes)
        made = [self.stream.beacon() for _ in range(_BEACONS)]
        self._lit = [beacon for beacon, _ in made]
        return name, [each for _, each in made]

    def _open(self, offered: Sequence[tuple[bytes, list[bytes]]]) -> None:
        """Open what the others have made."""
        for rank, (name, beacons) in enumerate(offered):
            if rank != self._comm.rank:
                self._parts[rank] = self.stream.open(name, _HALVES * self.nbytes)
                for sighted, each in zip(self._sighted, beacons, strict=True):
                    sighted.append(self.stream.sight(each))

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
        self._meet()  # all have set theirs, and follow those of the last fence
        for beacon in self._sighted[turn]:
            beacon.follow(self.stream)

    def close(self) -> None:
        """Give the memory back, once no rank uses it any more."""
        self.stream.synchronize()
        self._meet()
        own = self._parts.pop(self._comm.rank, None)
        while self._parts:
            self.stream.close(self._parts.popitem()[1])
        for beacon in chain(*self._sighted):
            beacon.close()
        self._meet()  # all have let go of this rank's
        del own
        _OPEN.remove(self)

    def _meet(self) -> None:
        """Return once all ranks have come here: one that does not is told by the watchdog, not by a silent device."""
        self._comm._run(Call("barrier"))


@cache
def _settle_at_exit() -> None:
    """At the end of the program, read what others have in their windows before they may be gone."""
    atexit.register(lambda: [window.stream.synchronize() for window in _OPEN])
