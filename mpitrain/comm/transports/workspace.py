"""How ordinary arrays pass through memory that a node shares: in chunks, in a pipeline with one fence a chunk.

In step k a rank copies its chunk k + 1 in, reduces its shard of chunk k, and copies the shards of chunk k − 1 that
others have reduced out.  Inputs and results each have two places, used in turn: between two uses of a place lies a
fence after its last reader.
"""

from __future__ import annotations

import numpy as np

from mpitrain._typing import Array, DType
from mpitrain.comm.transports.fence import Fence
from mpitrain.comm.transports.shards import bounds


class Workspace:
    """The shared memory that chunks pass through.

    Parameters
    ----------
    memory : array of uint8, shape (ranks of the node, CHUNKS × chunk_bytes)
        Row r is written by rank r only.
    rank : int
        This rank of the node.
    chunk_bytes : int
        A multiple of every item size.
    """

    CHUNKS = 4

    def __init__(self, memory: Array, rank: int, chunk_bytes: int) -> None:
        self.rank, self.ranks, self.chunk_bytes = rank, len(memory), chunk_bytes
        self._memory = memory
        self._places: dict[DType, list[list[Array]]] = {}

    def places(self, dtype: DType) -> list[list[Array]]:
        """Return the four places of a chunk, for each rank's values: two for inputs, then two for results."""
        if dtype not in self._places:
            cuts = [slice(i * self.chunk_bytes, (i + 1) * self.chunk_bytes) for i in range(self.CHUNKS)]
            self._places[dtype] = [[row[cut].view(dtype) for row in self._memory] for cut in cuts]
        return self._places[dtype]


class Stream:
    """One reduction in place of an ordinary array.

    Parameters
    ----------
    workspace : Workspace
        No other stream uses it at the same time.
    fence : Fence
        The node's.
    values : array, one-dimensional, contiguous
        Of equal size on all ranks.
    combine : ufunc
        Of two values.
    """

    def __init__(self, workspace: Workspace, fence: Fence, values: Array, combine: np.ufunc) -> None:
        self._rank, self._ranks = workspace.rank, workspace.ranks
        self._fence, self._combine = fence, combine
        self._places = workspace.places(values.dtype)
        length = workspace.chunk_bytes // values.itemsize
        self._chunks = [values[start : start + length] for start in range(0, values.size, length)]
        self._bounds = [
            bounds(chunk.size, self._ranks, values.itemsize) for chunk in self._chunks[:1] + self._chunks[-1:]
        ]

    def copy_in(self, k: int) -> None:
        """Hand over what the others reduce of a chunk."""
        chunk, place = self._chunks[k], self._places[k % 2][self._rank]
        begin, end = self._shard(k, self._rank)
        place[:begin] = chunk[:begin]
        place[end : chunk.size] = chunk[end:]

    def run(self) -> None:
        """Reduce; the first chunk was copied in before a fence that all have passed."""
        with np.errstate(all="ignore"):  # an overflow is the result's to show, as with the MPI library
            for k in range(len(self._chunks)):
                if k + 1 < len(self._chunks):
                    self.copy_in(k + 1)
                self._reduce(k)
                if k > 0:
                    self._copy_out(k - 1)
                self._fence.wait()
            self._copy_out(len(self._chunks) - 1)

    def _shard(self, k: int, rank: int) -> tuple[int, int]:
        cuts = self._bounds[k == len(self._chunks) - 1]
        return cuts[rank], cuts[rank + 1]

    def _reduce(self, k: int) -> None:
        begin, end = self._shard(k, self._rank)
        own = self._chunks[k][begin:end]
        parts = [place[begin:end] for place in self._places[k % 2]]
        parts[self._rank] = own
        # Not into the own chunk: it is read after the first two where this rank comes later in the order.
        result = self._places[2 + k % 2][self._rank][begin:end]
        self._combine(parts[0], parts[1], out=result)
        for part in parts[2:]:
            self._combine(result, part, out=result)
        own[...] = result

    def _copy_out(self, k: int) -> None:
        chunk, places = self._chunks[k], self._places[2 + k % 2]
        for rank in range(self._ranks):
            if rank != self._rank:
                begin, end = self._shard(k, rank)
                chunk[begin:end] = places[rank][begin:end]
