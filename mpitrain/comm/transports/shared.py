"""Reduction over memory that the ranks of a node share: each rank reduces its shard of everyone's array.

Arrays from `Communicator.empty` are reduced where they lie, after one fence and before another; no copy is sent.
Ordinary arrays pass chunk by chunk through a workspace that is kept: while a chunk is reduced, the next is copied in
and the one before is copied out, with one fence a chunk.  Values are combined in the order of the node's ranks, by one
rank for all, so that results are the same bits on every rank and in every call.

With several nodes, the ranks of one number on all nodes reduce their shard across nodes at the same time, so that
every byte leaves a node once (M. Bayatpour et al., "Scalable reduction collectives with data partitioning-based
multi-leader design", SC 2017, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from math import prod
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from mpitrain._typing import Array, DType, Shape
from mpitrain.arrays.dtypes import is_half
from mpitrain.comm.dtypes import UFUNCS
from mpitrain.comm.transports.blocks import NOWHERE, PAGE_BYTES, Arena, Place
from mpitrain.comm.transports.far import Far, FarStream, FarWorkspace
from mpitrain.comm.transports.fence import Fence
from mpitrain.comm.transports.program import Step, fold, perform
from mpitrain.comm.transports.shards import bounds, pieces
from mpitrain.comm.transports.transport import Planned, Transport
from mpitrain.comm.transports.workspace import Stream, Workspace

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

PIECE_BYTES = 128 * 1024
"""What is reduced at once: two or three pieces fit a core's own cache."""

CHUNK_BYTES = 256 * 1024
"""What passes through the workspace between two fences, of each rank; within one node."""

STREAMED_FROM_BYTES = 16 * 1024 * 1024
"""Ordinary arrays from this size on pass through the workspace; smaller ones are left to the MPI library.

Measured on two ranks of two cores: 0.7 of the library's speed at 1 and 4 MiB, 1.1 at 16, 1.8 at 64."""

SMALLEST_BYTES = 64 * 1024
"""Below this, arrays are left to the MPI library, wherever they lie, and no transport need be chosen."""


class SharedTransport(Transport):
    """Ranks that share their node's memory, on one node or on several of equal size.

    Parameters
    ----------
    comm : Communicator
        All ranks.
    across : Communicator or None
        The ranks of this one's number on every node; None if there is only one node.
    fence : callable
        From shared lines to the node's `Fence`.

    Raises
    ------
    StorageError
        The node's ranks cannot map each other's memory.

    Notes
    -----
    Collective over ``comm``.  Holds one mapping per rank of four chunks and a page.
    """

    name = "shared"

    def __init__(self, comm: Communicator, across: Communicator | None, fence: Callable[[Array], Fence]) -> None:
        self._comm, self._node, self._across = comm, comm.node, across
        self._arena = Arena(self._node)
        self._far = None if across is None else Far(across, self._node.rank, self._node.size)
        needed = Workspace.CHUNKS * CHUNK_BYTES if self._far is None else FarWorkspace.needed_bytes(self._far)
        _, memory = self._arena.allocate(PAGE_BYTES + needed)
        self._fence = fence(memory[:, :PAGE_BYTES])
        self._stream = self._streams(memory[:, PAGE_BYTES:])
        self._least_bytes = STREAMED_FROM_BYTES

    def empty(self, shape: Shape, dtype: DType) -> Array:
        """Return zeroed memory of this rank's."""
        nbytes = prod(shape) * dtype.itemsize
        _, memory = self._arena.allocate(int(self._comm.allreduce(nbytes, "max")))
        if self._across is None:  # several nodes must not come to different conclusions
            self._least_bytes = SMALLEST_BYTES
        return np.asarray(memory[self._node.rank, :nbytes]).view(dtype).reshape(shape)

    def allreduce(self, values: Array, op: str) -> bool:
        """Reduce an array in place where this transport is the faster way."""
        return self._allreduce(values, op, None)

    def allreduce_from(self, source: Array, values: Array, op: str) -> bool:
        """Copy chunk by chunk, while messages are under way."""
        if self._far is None or values.nbytes < STREAMED_FROM_BYTES or self._arena.locate(values) != NOWHERE:
            return False
        return self._allreduce(values, op, source)

    def _allreduce(self, values: Array, op: str, source: Array | None) -> bool:
        if values.nbytes < self._least_bytes:
            return False
        place = self._arena.locate(values)
        streams = values.nbytes >= STREAMED_FROM_BYTES
        stream = self._stream(values, op, source) if streams else None
        if stream is not None and place == NOWHERE:
            stream.copy_in(0)
        places = self._exchange(place, values, op)
        if _one_block(places):
            perform([*self._steps(op, self._views(places, values)), (self._fence.wait, ())])
        elif stream is not None:
            self._run(stream, place, places)
        return stream is not None or _one_block(places)

    def plan(self, buffer: Array, op: str, in_place: bool) -> Planned | None:
        """Lay out a reduction."""
        values = buffer.reshape(-1)
        if is_half(values.dtype) and self._across is not None:
            return None  # it would be rounded on every node, and again across
        places = [Place(*each) for each in self._node.allgather_object(tuple(self._arena.locate(values)))]
        if not self._comm.allreduce(np.uint8(_one_block(places)), "min"):
            return None
        parts = self._views(places, values)
        self._exchange(places[self._node.rank], values, op)  # dtype, op and size agree
        result = None if in_place else self._result(values)
        wait = (self._fence.wait, ())
        run = partial(perform, [wait, *self._steps(op, parts, result), wait])
        return Planned(run, buffer if result is None else _read_only(result.view().reshape(buffer.shape)))

    def free(self) -> None:
        """Release the communicator across nodes."""
        if self._across is not None:
            self._across.free()

    def _exchange(self, place: Place, values: Array, op: str) -> list[Place]:
        posts = self._fence.exchange(_kind(values.dtype, op), *place, values.size)
        return [Place(block, offset) for _, block, offset, _ in posts]

    def _views(self, places: list[Place], values: Array) -> list[Array]:
        """Return the array of every local rank, in rank order."""
        memory = self._arena.parts(places[0].block)
        rows = (
            memory[rank, place.offset_bytes : place.offset_bytes + values.nbytes] for rank, place in enumerate(places)
        )
        return [np.asarray(row).view(values.dtype) for row in rows]

    def _result(self, values: Array) -> Array:
        """Allocate one array for all ranks of the node, near to those that write its shards."""
        _, memory = self._arena.allocate(-(-values.nbytes // self._node.size))
        return np.asarray(memory.reshape(-1)[: values.nbytes]).view(values.dtype)

    def _steps(self, op: str, parts: list[Array], result: Array | None = None) -> Iterator[Step]:
        """Yield how this rank reduces its shard: into one result, or where it lies, for every rank."""
        if self._far is not None:
            yield from self._far.steps(op, parts, result, self._comm.size)
            return
        for piece in self._own_pieces(parts[0]):
            sources = [part[piece] for part in parts]
            into = sources[0] if result is None else result[piece]
            yield from fold(op, sources, into, self._comm.size)
            for target in sources[1:] if result is None else ():
                yield np.copyto, (target, into)

    def _own_pieces(self, values: Array) -> list[slice]:
        """Cut this rank's shard by cache size."""
        cuts, rank = bounds(values.size, self._node.size, values.itemsize), self._node.rank
        return pieces(cuts[rank], cuts[rank + 1], PIECE_BYTES // values.itemsize)

    def _streams(self, memory: Array) -> Callable[[Array, str, Array | None], Stream | FarStream]:
        """Return what makes the stream of an ordinary array through the workspace."""
        far, fence = self._far, self._fence
        if far is not None:
            across = FarWorkspace(far, memory)
            return lambda values, op, source: FarStream(far, across, fence, values, op, source)
        near = Workspace(memory, self._node.rank, CHUNK_BYTES)
        return lambda values, op, _: Stream(near, fence, values, UFUNCS[op])

    def _run(self, stream: Stream | FarStream, place: Place, places: list[Place]) -> None:
        """Stream what is not in one shared block, on all ranks."""
        if any(each != NOWHERE for each in places):
            if place != NOWHERE:
                stream.copy_in(0)
            self._fence.wait()
        stream.run()


def _one_block(places: list[Place]) -> bool:
    """Tell whether all arrays lie in one block, which all ranks hold; agreed, as all see the same places."""
    return places[0] != NOWHERE and len({place.block for place in places}) == 1


def _read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array


@cache
def _kind(dtype: DType, op: str) -> int:
    """Return a number for a dtype and a reduction that is the same in every process."""
    return crc32(f"{dtype.name} {op}".encode())
