"""Reduction over memory that the ranks of a node share: each rank reduces its shard of everyone's array.

Arrays from `Communicator.empty` are reduced where they lie, after one fence and before another; no copy is sent.
Ordinary arrays pass chunk by chunk through a workspace that is kept: while a chunk is reduced, the next is copied in
and the one before is copied out.  On one node compiled loops do both where they were built (`kernel`), else NumPy.
Values are combined in the order of the node's ranks, level by level on wide nodes, by one rank for all, or by both of
two, so that results are the same bits on every rank and in every call.

With several nodes, the ranks of one number on all nodes reduce their shard across nodes at the same time, so that
every byte leaves a node once (M. Bayatpour et al., "Scalable reduction collectives with data partitioning-based
multi-leader design", SC 2017, section 4).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from mpitrain._errors import MismatchError
from mpitrain._typing import Array, DType, Shape
from mpitrain.arrays.dtypes import is_half
from mpitrain.arrays.flatbuffer import plain
from mpitrain.comm.direct import Doing
from mpitrain.comm.dtypes import UFUNCS
from mpitrain.comm.transports import topology
from mpitrain.comm.transports.blocks import NOWHERE, Arena, Place
from mpitrain.comm.transports.entry import Entry, Loops
from mpitrain.comm.transports.far import Far, FarStream, FarWorkspace
from mpitrain.comm.transports.fence import Fence, kind_of
from mpitrain.comm.transports.kernel import AGAIN, PAST_CACHE_FROM_BYTES, PLACES, CompiledFence, Kernel
from mpitrain.comm.transports.levels import Levels
from mpitrain.comm.transports.pages import PAGE_BYTES
from mpitrain.comm.transports.program import Combine, perform
from mpitrain.comm.transports.sharding import CommonMemory, PlannedShard, far_allgather, far_reduce_scatter
from mpitrain.comm.transports.transport import Planned, Transport
from mpitrain.comm.transports.workspace import Stream, Workspace
from mpitrain.comm.watchdog import Watch

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

PIECE_BYTES = 128 * 1024
"""What is reduced at once: two or three pieces fit a core's own cache."""

CHUNK_BYTES = 256 * 1024
"""What passes through the workspace between two fences, of each rank; within one node."""

COMPILED_CHUNK_BYTES = 640 * 1024
"""The same with compiled loops, which pass no fences, on nodes of two ranks; on wider ones it is less."""

STREAMED_FROM_BYTES = 16 * 1024 * 1024
"""Ordinary arrays from this size on pass through the workspace in NumPy; smaller ones are left to the MPI library.

Measured on two ranks of two cores: 0.7 of the library's speed at 1 and 4 MiB, 1.1 at 16, 1.8 at 64."""

BY_LEVELS_FROM_BYTES = 1024 * 1024
"""Arrays in shared memory from this size on are reduced by the levels of the node, which costs a fence a level.

Set by the cost model: no machine with several caches or sockets was at hand to measure on."""

SMALLEST_BYTES = 64 * 1024
"""Below this, NumPy does not reduce arrays in place, wherever they lie."""

LOCATED_FROM_BYTES = 256 * 1024
"""Below this, compiled loops copy arrays in shared memory as they do others: to find where they lie takes longer."""


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
    kernel : callable, optional
        From the workspace's memory to the compiled loops, for a single node; None on all ranks alike.

    Raises
    ------
    StorageError
        The node's ranks cannot map each other's memory.

    Notes
    -----
    Collective over ``comm``.  Holds a block in which each rank of the node has a page and four chunks, or six where the
    loops are compiled, or on several nodes what `FarWorkspace` needs.
    """

    name = "shared"

    def __init__(
        self,
        comm: Communicator,
        across: Communicator | None,
        fence: Callable[[Array], Fence],
        kernel: Callable[[Array], Kernel] | None = None,
    ) -> None:
        self._comm, self._node, self._across = comm, comm.node, across
        self._arena = Arena(self._node)
        self._common = CommonMemory(self._arena, self._node.size)
        self._far = None if across is None else Far(across, self._node.rank, self._node.size)
        chunk_bytes = _chunk_bytes(self._node.size, kernel is not None)
        needed = (PLACES if kernel else Workspace.CHUNKS) * chunk_bytes
        if self._far is not None:
            needed = FarWorkspace.needed_bytes(self._far)
        _, memory = self._arena.allocate(PAGE_BYTES + needed)
        lines = memory[:, :PAGE_BYTES]
        self._kernel = kernel(memory) if kernel else None
        self._fence = CompiledFence(lines, self._node.rank, self._kernel) if self._kernel else fence(lines)
        self._stream = self._streams(memory[:, PAGE_BYTES:], chunk_bytes)
        self.least_bytes = 0 if kernel else STREAMED_FROM_BYTES
        self.always_left_bytes = min(self.least_bytes, SMALLEST_BYTES)
        self._levels = Levels.of(self._node.allgather_object(topology.domain(os.sched_getaffinity(0))))
        self._entry: Entry | None = None
        self._arena.changed = self._hold

    def empty(self, shape: Shape, dtype: DType) -> Array:
        """Return zeroed memory of this rank's."""
        nbytes = prod(shape) * dtype.itemsize
        _, memory = self._arena.allocate(int(self._comm.allgather(nbytes).max()))
        if self._across is None:  # several nodes must not come to different conclusions
            self.least_bytes = min(self.least_bytes, SMALLEST_BYTES)
        return np.asarray(memory[self._node.rank, :nbytes]).view(dtype).reshape(shape)

    def allreduce(self, send: Array, recv: Array, op: str) -> bool:
        """Reduce an array into another where this transport is the faster way."""
        kernel = self._kernel
        if kernel is not None and kernel.streams(send.dtype, op):
            post = (kind_of(send.dtype, op), *self._place(send, recv), send.size)
            self._settle(kernel, kernel.allreduce(op, send, recv, post), recv, op)
            return True
        return send.nbytes >= max(self.least_bytes, SMALLEST_BYTES) and self._by_numpy(send, recv, op)

    def loops(self, watch: Watch) -> Loops | None:
        """Return what reduces plain arrays without Python."""
        kernel = self._kernel
        if kernel is None:
            return None

        def complete(into: Array, op: str, said: int) -> Array:
            performed = "sum" if op == "mean" else op
            with watch.during(Doing("allreduce", into, performed)):
                self._settle(kernel, kernel.finish() if said == AGAIN else False, into, performed)
            if op == "mean":
                np.divide(into, kernel.ranks, out=into)
            return into

        return Loops(kernel, LOCATED_FROM_BYTES, complete)

    def follow(self, entry: Entry) -> None:
        """Take note of the way from a call to the loops."""
        self._entry = entry
        self._hold()

    def release(self) -> None:
        """Let go of what refers back to this transport, so that its memory need not wait for the cyclic collector."""
        self._entry = None
        self._arena.changed = lambda: None

    def plan(self, buffer: Array, op: str, in_place: bool) -> Planned | None:
        """Lay out a reduction."""
        values = buffer.reshape(-1)
        small = self._across is not None and values.nbytes < SMALLEST_BYTES  # takes as many steps
        if self._rounds_twice(values.dtype) or small:
            return None
        parts = self._parts(values, op)
        if parts is None or (self._kernel is not None and self._kernel.hands_over(values, op)):
            return self._plan_stream(buffer, op, in_place)
        result = None if in_place else self._result(values)
        run = self._lay_out(op, parts, result)
        return Planned(run, buffer if result is None else _read_only(result.view().reshape(buffer.shape)))

    def shared(self, shape: Shape, dtype: DType) -> Array:
        """Return zeroed memory that is one array for all ranks of a node."""
        return self.empty(shape, dtype) if self._rounds_twice(dtype) else self._common.empty(shape, dtype)

    def plan_reduce_scatter(self, buffer: Array, op: str) -> PlannedShard | None:
        """Lay out a reduction in memory from `empty` by shards."""
        parts = None if self._rounds_twice(buffer.dtype) else self._parts(buffer, op)
        if parts is None:
            return None
        if self._far is not None:
            return far_reduce_scatter(self._far, self._wait, op, parts, self._comm.size, PIECE_BYTES)
        last = self._levels_for(buffer).phases(self._node.rank, buffer.size, buffer.itemsize)[-1]
        combines = self._combines(op, parts, None)
        shard = combines[-1].targets[self._node.rank]
        combines[-1] = replace(combines[-1], targets=[shard])
        return PlannedShard(self._run_of(op, combines, holds=True), last.begin, last.end, shard)

    def plan_allgather(self, buffer: Array, begin: int, end: int) -> Callable[[], object] | None:
        """Lay out what publishes shards in memory from `shared`."""
        places = self._node.allgather_object(tuple(self._common.locate(buffer)))
        common = Place(*places[0]) != NOWHERE and len(set(places)) == 1
        if not self._agree(common):
            return None
        if self._far is None:
            return self._wait
        return far_allgather(self._far, self._wait, buffer, begin, end, self._agree)

    def _agree(self, good: bool) -> bool:
        return bool(self._comm.allreduce(np.uint8(good), "min"))

    def _wait(self) -> None:
        """Pass a fence of the node's; across nodes messages must go on meanwhile."""
        self._fence.wait(None if self._across is None else self._across._progress)

    def _rounds_twice(self, dtype: DType) -> bool:
        """Tell whether values would be rounded on every node, and again across."""
        return is_half(dtype) and self._across is not None

    def _parts(self, values: Array, op: str) -> list[Array] | None:
        """Return the array of every local rank if all lie in one block on all nodes; dtype, op and size agree."""
        places = [Place(*each) for each in self._node.allgather_object(tuple(self._arena.locate(values)))]
        shared = bool(self._comm.allgather(_one_block(places)).all())
        self._fence.exchange(kind_of(values.dtype, op), *places[self._node.rank], values.size)
        return self._views(places, values) if shared else None

    def _plan_stream(self, buffer: Array, op: str, in_place: bool) -> Planned | None:
        """Lay out the reduction of ordinary arrays, which compiled loops do faster than the library at any size."""
        if self._kernel is None or not self._kernel.streams(buffer.dtype, op):
            return None
        own = buffer if in_place else plain(buffer.size, buffer.dtype).reshape(buffer.shape)
        run = self._kernel.plan(op, buffer, own, self._node.size if op == "mean" else 0)
        return Planned(run, own if in_place else _read_only(own.view()))

    def _place(self, send: Array, recv: Array) -> Place:
        """Return where an array lies, if it is to be reduced there."""
        matters_from_bytes = SMALLEST_BYTES if self._kernel is None else LOCATED_FROM_BYTES
        return self._arena.locate(recv) if send is recv and send.nbytes >= matters_from_bytes else NOWHERE

    def _settle(self, kernel: Kernel, done: bool, recv: Array, op: str) -> None:
        """End a reduction by the loops; they leave it where ranks posted different numbers, or a block."""
        if done:
            return
        try:
            posts = self._fence.posts(kind_of(recv.dtype, op), recv.size)
        except MismatchError:
            kernel.give_up(handed_in=True)
            raise
        if _one_block(_places(posts)):
            kernel.give_up(handed_in=False)
            self._reduce_where_it_lies(posts, recv, op)
        else:
            kernel.resume()

    def _by_numpy(self, send: Array, recv: Array, op: str) -> bool:
        place = self._place(send, recv)
        stream = self._stream(send, recv, op) if send.nbytes >= STREAMED_FROM_BYTES else None
        if stream is not None and place == NOWHERE:
            stream.copy_in(0)
        try:
            posts = self._fence.exchange(kind_of(send.dtype, op), *place, send.size)
        except MismatchError:
            if self._kernel is not None:  # by which others may have handed in a chunk, and give up
                self._kernel.give_up(handed_in=True)
            raise
        places = _places(posts)
        if _one_block(places):
            self._reduce_where_it_lies(posts, recv, op)
        elif stream is not None:
            self._run(stream, place, places)
        return stream is not None or _one_block(places)

    def _reduce_where_it_lies(self, posts: list[list[int]], values: Array, op: str) -> None:
        """Reduce arrays that all lie in one block, in place; compiled loops do it by themselves the next time."""
        run = self._lay_out(op, self._views(_places(posts), values), None)
        if self._kernel is not None and self._kernel.streams(values.dtype, op):  # this holds no memory
            self._kernel.remember(list(chain.from_iterable(posts)), run)
        run()

    def _hold(self) -> None:
        """Tell the entry in which memory arrays are reduced where they lie."""
        if self._entry is None:
            return
        held = self._arena.held()  # so none of them goes, and is told to have gone, before this is told
        parts = ((memory.own.start, memory.own.stop, number) for number, memory in held.items())
        self._entry.hold(array("q", chain.from_iterable(parts)).tobytes())

    def _lay_out(self, op: str, parts: list[Array], result: Array | None) -> Callable[[], object]:
        """Return what reduces arrays in shared memory, between two fences: into one result, or where they lie."""
        wait = (self._fence.wait, ())
        if self._far is not None:
            return partial(perform, [wait, *self._far.steps(op, parts, result, self._comm.size), wait])
        return self._run_of(op, self._combines(op, parts, result), result is not None)

    def _run_of(self, op: str, combines: list[Combine], holds: bool) -> Callable[[], object]:
        """Return what combines, each after a fence, and passes one more; by compiled loops where there are any."""
        run = self._kernel.reduction(op, combines, holds) if self._kernel is not None else None
        if run is not None:
            return run
        wait = (self._fence.wait, ())
        steps = (step for each in combines for step in (wait, *each.steps(op, PIECE_BYTES)))
        return partial(perform, [*steps, wait])

    def _combines(self, op: str, parts: list[Array], result: Array | None) -> list[Combine]:
        """Return what this rank combines at each level of the node, and where."""
        levels = self._levels_for(parts[0])
        phases = levels.phases(self._node.rank, parts[0].size, parts[0].itemsize)
        partials, base = (parts, 0) if result is None else self._partials(levels, parts[0])
        found, sources, shift = [], parts, 0
        for phase in phases[:-1]:
            into = partials[self._node.rank][phase.begin - base : phase.end - base]
            found.append(Combine([sources[r][phase.begin - shift : phase.end - shift] for r in phase.sources], [into]))
            sources, shift = partials, base
        last = phases[-1]
        cut = slice(last.begin, last.end)
        targets = [part[cut] for part in parts] if result is None else [result[cut]]
        past_cache = result is not None and result.nbytes >= PAST_CACHE_FROM_BYTES
        divisor = self._node.size if op == "mean" else 0
        gathered = [sources[r][last.begin - shift : last.end - shift] for r in last.sources]
        return [*found, Combine(gathered, targets, divisor, past_cache)]

    def _levels_for(self, values: Array) -> Levels:
        by_levels = values.nbytes >= BY_LEVELS_FROM_BYTES and not is_half(values.dtype)  # those are rounded once
        return self._levels if by_levels else Levels((self._node.size,))

    def _partials(self, levels: Levels, like: Array) -> tuple[list[Array], int]:
        """Return memory of every rank for what it combines before the last level, and the first element of mine."""
        if len(levels.sizes) == 1:
            return [], 0
        first = [levels.phases(rank, like.size, like.itemsize)[0] for rank in range(self._node.size)]
        _, memory = self._arena.allocate(max(phase.end - phase.begin for phase in first) * like.itemsize)
        own = first[self._node.rank]
        return [
            np.asarray(row[: row.size // like.itemsize * like.itemsize]).view(like.dtype) for row in memory
        ], own.begin

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

    def _streams(self, memory: Array, chunk_bytes: int) -> Callable[[Array, Array, str], Stream | FarStream]:
        """Return what makes the stream of ordinary arrays through the workspace."""
        far, fence = self._far, self._fence
        if far is not None:
            across = FarWorkspace(far, memory)
            return lambda send, recv, op: FarStream(far, across, fence, recv, op, None if send is recv else send)
        near = Workspace(memory, self._node.rank, chunk_bytes)

        def stream(send: Array, recv: Array, op: str) -> Stream:
            if send is not recv:
                np.copyto(recv, send)
            return Stream(near, fence, recv, UFUNCS[op])

        return stream

    def _run(self, stream: Stream | FarStream, place: Place, places: list[Place]) -> None:
        """Stream what is not in one shared block, on all ranks."""
        if any(each != NOWHERE for each in places):
            if place != NOWHERE:
                stream.copy_in(0)
            self._fence.wait()
        stream.run()
        if self._kernel is not None:
            self._fence.wait()  # compiled loops use the places next without passing one


def _chunk_bytes(ranks: int, compiled: bool) -> int:
    """Return what passes through the workspace at once; compiled loops want the chunks of a node to fit its cache."""
    return max(CHUNK_BYTES, 2 * COMPILED_CHUNK_BYTES // ranks) if compiled else CHUNK_BYTES


def _places(posts: list[list[int]]) -> list[Place]:
    return [Place(block, offset) for _, block, offset, _ in posts]


def _one_block(places: list[Place]) -> bool:
    """Tell whether all arrays lie in one block, which all ranks hold; agreed, as all see the same places."""
    return places[0] != NOWHERE and len({place.block for place in places}) == 1


def _read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array
