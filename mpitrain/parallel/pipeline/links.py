"""What travels between stages: outputs to the next one, gradients to the one before.

Sends never block: what is sent is copied to memory of its own, which goes back to the pool once the message has left.
A message has a tag for its stage and direction; within one tag the microbatches come in ascending order on both sides,
so that nothing else needs to be said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpitrain._typing import Array, DType, Shape
from mpitrain.comm import Communicator
from mpitrain.comm.request import Request
from mpitrain.nn.pool import Pool
from mpitrain.parallel.pipeline.schedule import Sizes


@dataclass(frozen=True)
class Edge:
    """A message: what a stage is handed for a microbatch.

    Parameters
    ----------
    stage : int
        The stage that gets it.
    source : int
        The stage that it comes from: the one before for an input, the one after for a gradient.
    microbatch : int
        Its microbatch.
    """

    stage: int
    source: int
    microbatch: int

    @property
    def tag(self) -> int:
        """Number of the stage that gets it, and of the direction."""
        return 2 * self.stage + (self.source > self.stage)


class Links:
    """A rank's messages from and to the neighbours of its stages.

    Parameters
    ----------
    comm : Communicator
        Along the pipeline.
    sizes : Sizes
        Which rank has which stage.
    pool : Pool
        Where the memory of messages comes from.
    xp, dtype
        Library and type of what is sent.
    """

    def __init__(self, comm: Communicator, sizes: Sizes, pool: Pool, xp: Any, dtype: DType) -> None:
        self._comm, self._sizes, self._pool, self._xp, self._dtype = comm, sizes, pool, xp, dtype
        self._coming: dict[Edge, Callable[[], Array]] = {}
        self._leaving: list[tuple[Request, Array]] = []

    def send(self, edge: Edge, array: Array) -> None:
        """Begin to hand an array over; it may be overwritten at once."""
        kept = self._pool.take(array.shape, self._dtype, self._xp)
        kept[...] = array
        dest = self._sizes.rank_of(edge.stage)
        if dest == self._comm.rank:
            self._coming[edge] = lambda: kept
        else:
            self._leaving.append((self._comm.isend(kept, dest, edge.tag), kept))

    def expect(self, edge: Edge, shape: Shape) -> None:
        """Be ready for what a stage will be handed; once each, and in the order in which it is sent."""
        source = self._sizes.rank_of(edge.source)
        if source != self._comm.rank:
            buffer = self._pool.take(shape, self._dtype, self._xp)
            self._coming[edge] = self._comm.irecv(buffer, source, edge.tag, out=buffer).wait

    def receive(self, edge: Edge) -> Array:
        """Wait for what a stage is handed; `release` takes the array back."""
        return self._coming.pop(edge)()

    def release(self, array: Array) -> None:
        """Take an array back that `receive` gave."""
        self._pool.give(array)

    def sweep(self) -> None:
        """Take back the memory of messages that have left; moves on those that have not."""
        still = []
        for request, array in self._leaving:
            if request.test():
                self._pool.give(array)
            else:
                still.append((request, array))
        self._leaving = still

    def finish(self) -> None:
        """Wait until all messages have left."""
        for request, array in self._leaving:
            request.wait()
            self._pool.give(array)
        self._leaving.clear()
