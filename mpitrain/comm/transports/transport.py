"""What performs the large reductions of a communicator, allocates its shared memory and plans its hot calls."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpitrain._typing import Array, DType, Shape
from mpitrain.comm.watchdog import Watch

if TYPE_CHECKING:
    from mpitrain.comm.transports.entry import Entry, Loops
    from mpitrain.comm.transports.sharding import PlannedShard


@dataclass(frozen=True, eq=False)
class Planned:
    """A reduction that is laid out and only waits to be performed.

    Parameters
    ----------
    run : callable
        Performs it once.
    result : array
        Where the result is afterwards, in the buffer's shape; read-only unless it is the buffer.
    guarded : bool
        It tells the watchdog of itself, and refuses to run once the communicator is freed.
    """

    run: Callable[[], object]
    result: Array
    guarded: bool = False


class Transport(ABC):
    """One way to move data among the ranks of a communicator.

    Attributes
    ----------
    name : str
        As `MPITRAIN_TRANSPORT` calls it.
    why : str
        Why it was chosen, for people.
    least_bytes : float
        Smaller arrays are left to the communicator's own way.  May become less when memory is allocated.
    always_left_bytes : float
        `least_bytes` never becomes less than this.
    """

    name: str
    why: str = ""
    least_bytes: float = math.inf
    always_left_bytes: float = 0

    @abstractmethod
    def empty(self, shape: Shape, dtype: DType) -> Array:
        """Return zeroed memory of this rank's that the ranks of its node reduce fastest.  Collective."""

    @abstractmethod
    def allreduce(self, send: Array, recv: Array, op: str) -> bool:
        """Reduce a contiguous one-dimensional array into another; tell whether it was done.  Collective.

        Both may be the same array.  False where the communicator's own way is faster; then nothing was communicated.
        ``op`` is never ``mean``.
        """

    def loops(self, watch: Watch) -> Loops | None:
        """Return what reduces plain arrays without Python; None if nothing does.

        ``watch`` is told of calls that have to wait.
        """
        return None

    def follow(self, entry: Entry) -> None:  # noqa: B027
        """Keep what calls `loops`, to tell it whenever memory comes or goes in which arrays are reduced in place."""

    def release(self) -> None:  # noqa: B027
        """Let go of what keeps this transport's memory, once its communicator is freed; plans keep what they use."""

    @abstractmethod
    def plan(self, buffer: Array, op: str, in_place: bool) -> Planned | None:
        """Plan reductions of a contiguous buffer; None where nothing beats the communicator's own way.  Collective."""

    def shared(self, shape: Shape, dtype: DType) -> Array:
        """Return zeroed memory that is one array for all ranks of a node; where that cannot be, each its own.

        Collective.
        """
        return self.empty(shape, dtype)

    def plan_reduce_scatter(self, buffer: Array, op: str) -> PlannedShard | None:
        """Plan reductions of a one-dimensional buffer by shards; None for the communicator's own way.  Collective."""
        return None

    def plan_allgather(self, buffer: Array, begin: int, end: int) -> Callable[[], object] | None:
        """Plan how all get what each writes between ``begin`` and ``end``; None as above.  Collective."""
        return None
