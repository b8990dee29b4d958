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
from mpitrain.comm.buffers import wire
from mpitrain.comm.calls import Call
from mpitrain.comm.dtypes import UFUNCS
from mpitrain.comm.transports.blocks import NOWHERE, PAGE_BYTES, Arena, Place
from mpitrain.comm.transports.fence import Fence
from mpitrain.comm.transports.program import Step, fold, perform
from mpitrain.comm.transports.shards import bounds, pieces, shards_of_chunks
from mpitrain.comm.transports.transport import Planned, Transport
from mpitrain.comm.transports.workspace import Stream, Workspace

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

PIECE_BYTES = 128 * 1024
"""What is reduced at once: two or three pieces fit a core's own cache."""

CHUNK_BYTES = 256 * 1024
"""What passes through the workspace between two fences, of each rank; within one node."""

FAR_CHUNK_BYTES = 4 * 1024 * 1024
"""The same with several nodes, where each chunk costs a message across; arrays in shared memory are cut alike."""

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
        self._chunk_bytes = CHUNK_BYTES if across is None else FAR_CHUNK_BYTES
        _, memory = self._arena.allocate(PAGE_BYTES + Workspace.CHUNKS * self._chunk_bytes)
        self._fence = fence(memory[:, :PAGE_BYTES])
        self._workspace = Workspace(memory[:, PAGE_BYTES:], self._node.rank, self._chunk_bytes)
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
        if values.nbytes < self._least_bytes:
            return False
        place = self._arena.locate(values)
        streams = values.nbytes >= STREAMED_FROM_BYTES
        stream = Stream(self._workspace, self._fence, values, UFUNCS[op], self._far(op)) if streams else None
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
        far = self._far(op)
        for piece in self._own_pieces(parts[0]):
            sources = [part[piece] for part in parts]
            into = sources[0] if result is None else result[piece]
            yield from fold(op, sources, into, self._comm.size if far is None else 0)
            if far is not None:
                yield far, (into,)
            if far is not None and op == "mean":
                yield np.divide, (into, self._comm.size, into)
            for target in sources[1:] if result is None else ():
                yield np.copyto, (target, into)

    def _own_pieces(self, values: Array) -> list[slice]:
        """Cut this rank's shard: by cache size within a node; across nodes into the messages that streams send."""
        item_bytes, rank, ranks = values.itemsize, self._node.rank, self._node.size
        if self._across is None:
            cuts = bounds(values.size, ranks, item_bytes)
            return pieces(cuts[rank], cuts[rank + 1], PIECE_BYTES // item_bytes)
        return shards_of_chunks(values.size, rank, ranks, item_bytes, self._chunk_bytes)

    def _far(self, op: str) -> Callable[[Array], None] | None:
        across = self._across
        if across is None:
            return None
        summed = "sum" if op == "mean" else op

        def reduce_across(shard: Array) -> None:
            across._run(Call("allreduce", dtype=shard.dtype, recv=wire(shard), op=summed))  # a part, not to be counted

        return reduce_across

    def _run(self, stream: Stream, place: Place, places: list[Place]) -> None:
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
