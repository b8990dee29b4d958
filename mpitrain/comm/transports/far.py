"""Reductions across nodes of what the ranks of each node reduce among themselves, in one pipeline with that.

Every rank of a node talks to the ranks of its own number on the other nodes, all at once, about its own shards.  While
one piece of a shard is reduced in the node's memory, others are under way (`mpitrain.comm.algorithms.pipelined`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mpitrain._typing import Array
from mpitrain.comm.algorithms.pipelined import DEPTH, piece_bytes, reduce_pieces
from mpitrain.comm.buffers import wire
from mpitrain.comm.calls import Call
from mpitrain.comm.dtypes import UFUNCS
from mpitrain.comm.transports.fence import Fence
from mpitrain.comm.transports.program import Step, fold, perform
from mpitrain.comm.transports.shards import LINE_BYTES, bounds, pieces_of_chunks

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

PIPELINED_FROM_BYTES = 1 << 20
"""Arrays from this size on are reduced across nodes by the pipeline; the MPI library is as fast with smaller ones."""

SHARD_BYTES = 512 * 1024
"""What each rank reduces across nodes between two fences, but for being a whole number of pieces."""

CHUNK_BYTES = 4 * 1024 * 1024
"""The most that passes through the workspace between two fences, of each rank."""


class Far:
    """One rank's part of the reductions across nodes.

    Parameters
    ----------
    across : Communicator
        The ranks of this one's number on every node.
    rank, ranks : int
        This rank in its node, and how many the node has.

    Attributes
    ----------
    chunk_bytes : int
        Arrays are cut into chunks, each chunk into the ranks' shards, and each shard into `pieces`: on every node
        alike, wherever its arrays lie.
    pieces : int
        Of a shard.
    lag : int
        How many chunks are between the one that is reduced in the node and one that is surely reduced across.
    """

    def __init__(self, across: Communicator, rank: int, ranks: int) -> None:
        self.across, self.rank, self.ranks = across, rank, ranks
        whole = piece_bytes(across.size)
        self.pieces = max(1, SHARD_BYTES // whole)
        shard_bytes = min(self.pieces * whole, CHUNK_BYTES // ranks) // LINE_BYTES * LINE_BYTES
        self.chunk_bytes = max(LINE_BYTES, shard_bytes) * ranks
        self.lag = -(-2 * DEPTH // self.pieces)

    def steps(self, op: str, parts: Sequence[Array], result: Array | None, total_ranks: int) -> Iterator[Step]:
        """Yield how this rank reduces its shards of mapped arrays.

        Parameters
        ----------
        op : str
            A reduction; ``mean`` divides by ``total_ranks``.
        parts : sequence of array
            Those of the node's ranks, in order.
        result : array or None
            Where it goes; None: in place of every part.
        """
        pipelined = parts[0].nbytes >= PIPELINED_FROM_BYTES
        cuts = pieces_of_chunks(
            parts[0].size, self.rank, self.ranks, parts[0].itemsize, self.chunk_bytes, self.pieces if pipelined else 1
        )
        rounds = [_round(op, [part[cut] for part in parts], None if result is None else result[cut]) for cut in cuts]
        divisor = total_ranks if op == "mean" else 0
        summed = "sum" if op == "mean" else op
        if pipelined:
            yield self._reduce, (summed, rounds, divisor)
            return
        for near, piece, copies in rounds:
            yield from near
            yield self._reduce_at_once, (summed, piece)
            if divisor:
                yield np.divide, (piece, divisor, piece)
            yield from copies

    def _reduce(self, op: str, rounds: list[_Round], divisor: int) -> None:
        reduce_pieces(
            self.across._links, [wire(each.piece) for each in rounds], UFUNCS[op], divisor,
            before=lambda i: perform(rounds[i].near), after=lambda i: perform(rounds[i].copies),
        )  # fmt: skip

    def _reduce_at_once(self, op: str, piece: Array) -> None:
        # A part of a reduction, not to be counted.
        self.across._run(Call("allreduce", dtype=piece.dtype, recv=wire(piece), op=op))


class _Round(NamedTuple):
    """A piece of a shard: how it is reduced within the node, where it is then, and how it gets to all."""

    near: list[Step]
    piece: Array
    copies: list[Step]


def _round(op: str, parts: list[Array], result: Array | None) -> _Round:
    into = parts[0] if result is None else result
    copies: list[Step] = [(np.copyto, (target, into)) for target in parts[1:]] if result is None else []
    return _Round(list(fold(op, parts, into, 0)), into, copies)


class FarWorkspace:
    """The shared memory that chunks of ordinary arrays pass through; inputs and results have places used in turn.

    Parameters
    ----------
    far : Far
        Says how large they are.
    memory : array of uint8, shape (ranks of the node, `needed_bytes`)
        Row r is written by rank r only.
    """

    INPUTS = 2

    def __init__(self, far: Far, memory: Array) -> None:
        end, shard_bytes = self.INPUTS * far.chunk_bytes, far.chunk_bytes // far.ranks
        self._inputs = memory[:, :end].reshape(far.ranks, self.INPUTS, far.chunk_bytes)
        self._results = memory[:, end : self.needed_bytes(far)].reshape(far.ranks, self._places(far), shard_bytes)

    @classmethod
    def needed_bytes(cls, far: Far) -> int:
        """Return how much of each rank's memory it takes."""
        return cls.INPUTS * far.chunk_bytes + cls._places(far) * (far.chunk_bytes // far.ranks)

    @staticmethod
    def _places(far: Far) -> int:
        return far.lag + 2  # one is written while the oldest is copied out

    def input(self, k: int, rank: int) -> Array:
        """Return the bytes of a rank's values of chunk k."""
        return np.asarray(self._inputs[rank, k % self.INPUTS])

    def result(self, k: int, rank: int) -> Array:
        """Return the bytes of the shard of chunk k that a rank reduces."""
        return np.asarray(self._results[rank, k % self._results.shape[1]])


class FarStream:
    """One reduction in place of an ordinary array, in chunks with a fence each.

    In step k a rank copies its chunk k + 1 in, reduces its shard of chunk k with those of its node and hands it to the
    pipeline, and copies out the shards of chunk k − 1 − lag, which others have reduced.

    Parameters
    ----------
    far : Far
        How arrays are cut.
    workspace : FarWorkspace
        No other stream uses it at the same time.
    fence : Fence
        The node's.
    values : array, one-dimensional, contiguous
        Of equal size on all ranks.
    op : str
        A reduction, not ``mean``.
    source : array, optional
        What ``values`` are to begin with; None: they are there.
    """

    def __init__(
        self, far: Far, workspace: FarWorkspace, fence: Fence, values: Array, op: str, source: Array | None = None
    ) -> None:  # fmt: skip
        self._far, self._workspace, self._fence, self._combine = far, workspace, fence, UFUNCS[op]
        self._values, self._source = values, source
        self._length = far.chunk_bytes // values.itemsize
        self._count = -(-values.size // self._length)
        self._cuts = pieces_of_chunks(values.size, far.rank, far.ranks, values.itemsize, far.chunk_bytes, far.pieces)

    def copy_in(self, k: int) -> None:
        """Hand over what the others reduce of a chunk."""
        chunk = self._chunk(k)
        if self._source is not None:
            chunk[...] = self._source[k * self._length : (k + 1) * self._length]
        place = self._workspace.input(k, self._far.rank).view(chunk.dtype)
        begin, end = self._shard(k, self._far.rank)
        place[:begin] = chunk[:begin]
        place[end : chunk.size] = chunk[end:]

    def run(self) -> None:
        """Reduce; the first chunk was copied in before a fence that all have passed."""
        pieces = [self._result(i) for i in range(len(self._cuts))]

        def after(i: int) -> None:
            self._values[self._cuts[i]] = pieces[i]

        with np.errstate(all="ignore"):  # an overflow is the result's to show, as with the MPI library
            reduce_pieces(self._far.across._links, pieces, self._combine, before=self._before, after=after)
        self._wait()
        for k in range(max(0, self._count - 1 - self._far.lag), self._count):
            self._copy_out(k)

    def _before(self, i: int) -> None:
        """Reduce a piece within the node; enter the chunk that it begins."""
        k, number = divmod(i, self._far.pieces)
        if number == 0:
            self._enter(k)
        cut, result = self._cuts[i], self._result(i)
        begin = cut.start - k * self._length
        parts = [
            self._values[cut] if rank == self._far.rank
            else self._workspace.input(k, rank).view(result.dtype)[begin : begin + result.size]
            for rank in range(self._far.ranks)
        ]  # fmt: skip
        self._combine(parts[0], parts[1], out=result)
        for part in parts[2:]:
            self._combine(result, part, out=result)

    def _enter(self, k: int) -> None:
        if k > 0:
            self._wait()
        if k + 1 < self._count:
            self.copy_in(k + 1)
        if k > self._far.lag:
            self._copy_out(k - 1 - self._far.lag)

    def _wait(self) -> None:
        # Messages must go on: a rank of another node may need them before it comes to the fence of its own node.
        self._fence.wait(self._far.across._progress)

    def _result(self, i: int) -> Array:
        """Return where the result of a piece is, in this rank's memory."""
        k, cut = i // self._far.pieces, self._cuts[i]
        start = cut.start - k * self._length - self._shard(k, self._far.rank)[0]
        shard = self._workspace.result(k, self._far.rank).view(self._values.dtype)
        return shard[start : start + cut.stop - cut.start]

    def _copy_out(self, k: int) -> None:
        chunk = self._chunk(k)
        for rank in range(self._far.ranks):
            if rank != self._far.rank:
                begin, end = self._shard(k, rank)
                chunk[begin:end] = self._workspace.result(k, rank).view(chunk.dtype)[: end - begin]

    def _chunk(self, k: int) -> Array:
        return self._values[k * self._length : (k + 1) * self._length]

    def _shard(self, k: int, rank: int) -> tuple[int, int]:
        cuts = bounds(self._chunk(k).size, self._far.ranks, self._values.itemsize)
        return cuts[rank], cuts[rank + 1]
