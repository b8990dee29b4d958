"""The compiled inner loops of the shared transport, where they were built: what `kernel.c` does, called from Python.

They are optional.  Without them the same reductions run in NumPy, with the same bits, and slower.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_int64, c_void_p, pointer
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain import _env
from mpitrain._typing import Array, DType
from mpitrain.arrays.compiled import CompiledLibrary, address
from mpitrain.comm.transports.fence import LINE_BYTES, POSTED, Fence
from mpitrain.comm.transports.program import Combine

LIBRARY = CompiledLibrary(Path(__file__).with_name("_kernel.so"), "mpitrain_abi", 5)

_TYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")
_OPS = ("sum", "prod", "min", "max", "and", "or")
AGAIN = 1
"""What a loop says that has waited for long enough, and is to be called again."""

_PATIENCE = 50
_NAP_S = 50e-6

SPINS = 2000
"""Looks of a waiting rank that has a core to itself, before it yields: some 50 µs."""

LAID_OUT = 1024
"""How many reductions of arrays where they lie are remembered."""

PLACES = 6
"""Of a rank: three for chunks that it hands in, and three for results."""

SLOT_BYTES = 1536
"""Arrays up to this size are handed over whole and combined by every rank; two slots and the counters fill a page."""

PAST_CACHE_FROM_BYTES = 8 * 1024 * 1024
"""Results from this size on are stored past the cache, which would not hold them until they are read.

Those in shared memory only where lines of another core come slowly."""


class _LaidOut(ctypes.Structure):
    _fields_ = [("posts", POINTER(c_int64)), ("reduction", c_void_p)]


class _Team(ctypes.Structure):
    _fields_ = [
        ("rows", c_void_p), ("row_bytes", c_int64), ("header_bytes", c_int64), ("place_bytes", c_int64),
        ("chunk_bytes", c_int64), ("slot_bytes", c_int64), ("rank", c_int64), ("ranks", c_int64), ("spins", c_int64),
        ("fence", c_int64), ("exchanges", c_int64), ("chunks", c_int64), ("late", c_int64), ("patience", c_int64),
        ("to_memory", c_int64), ("slow", c_int64), ("writes", c_int64), ("trading", c_int64), ("traded", c_int64),
        ("timed", c_int64), ("laid_out", POINTER(_LaidOut)), ("laid_out_count", c_int64), ("laid_out_next", c_int64),
        ("brief", c_int64),
    ]  # fmt: skip


class _Operation(ctypes.Structure):
    _fields_ = [("kind", c_int64), ("item_bytes", c_int64), ("divisor", c_int64)]


class _Combination(ctypes.Structure):
    _fields_ = [
        ("op", POINTER(_Operation)), ("parts", POINTER(c_void_p)), ("part_count", c_int64),
        ("results", POINTER(c_void_p)), ("result_count", c_int64), ("nbytes", c_int64), ("past_cache", c_int64),
    ]  # fmt: skip


class _SharedReduction(ctypes.Structure):
    _fields_ = [("ranks", POINTER(_Team)), ("steps", POINTER(_Combination)), ("count", c_int64), ("done", c_int64)]


class _Stream(ctypes.Structure):
    _fields_ = [
        ("ranks", POINTER(_Team)), ("op", POINTER(_Operation)), ("source", c_void_p), ("target", c_void_p),
        ("parts", POINTER(c_void_p)), ("nbytes", c_int64), ("past_cache", c_int64), ("met", c_int64),
        ("handed_in", c_int64), ("reduced", c_int64), ("taken", c_int64), ("where_it_lies", c_void_p),
        ("post", c_int64 * POSTED),
    ]  # fmt: skip


def available() -> bool:
    """Tell whether this rank can use the compiled loops; ``MPITRAIN_KERNEL=off`` forbids it."""
    return _env.kernel() and LIBRARY.loaded is not None


@cache
def _operation(dtype: DType, op: str, divisor: int) -> tuple[_Operation, Any] | None:
    """Return how the loops know a reduction, and a pointer to it; None if they do not."""
    part = np.dtype(f"f{dtype.itemsize // 2}") if dtype.kind == "c" and op in ("sum", "mean") else dtype
    name = "uint8" if part.kind == "b" else part.name
    op = "sum" if op == "mean" else op
    if name not in _TYPES or op not in _OPS or (part.kind == "f" and op in ("and", "or")):
        return None
    operation = _Operation(_TYPES.index(name) * len(_OPS) + _OPS.index(op), part.itemsize, divisor)
    return operation, pointer(operation)


def operation_address(dtype: DType, op: str) -> int | None:
    """Return where the loops find a reduction, which stays there; None if they know it not."""
    found = _operation(dtype, op, 0)
    return None if found is None else ctypes.addressof(found[0])


class Kernel:
    """The loops at work for one rank of a node.

    Parameters
    ----------
    memory : array of uint8, shape (ranks, header_bytes + PLACES * the size of a place)
        Shared and zero at first; row r is written by rank r only.
    rank : int
        This rank of the node.
    header_bytes : int
        Of a row, for the counters and slots: a page.
    spins : int
        How often a waiting rank looks before it yields.
    progress : callable
        Called now and then while this rank waits: lets messages go on that others may be waiting for.

    Attributes
    ----------
    ranks : int
        Of the node.
    fence : callable
        Returns once every rank of the node has come there as often as this one.  Collective over the node.

    Notes
    -----
    All ranks of a node use the loops, or none does.
    """

    def __init__(
        self, memory: Array, rank: int, header_bytes: int, spins: int, progress: Callable[[], object]
    ) -> None:  # fmt: skip
        ranks, row_bytes = memory.shape
        place_bytes = (row_bytes - header_bytes) // PLACES // LINE_BYTES * LINE_BYTES
        found = LIBRARY.loaded
        assert found is not None
        self.ranks, self._library = ranks, found
        sizes = row_bytes, header_bytes, place_bytes, place_bytes, SLOT_BYTES
        self._team = _Team(address(memory), *sizes, rank, ranks, spins)
        self._team.patience = _PATIENCE
        self._team.memory = memory  # held by whatever holds the team, which knows an address only
        self._table, self._remembered = (_LaidOut * LAID_OUT)(), list[tuple[Any, Callable[[], object]]]()
        self._team.laid_out = self._table
        self._finish = partial(_finish, self._team, progress)
        self.fence = partial(self._finish, found.mpitrain_fence, byref(self._team))
        self._stream = _Stream(pointer(self._team), None, None, None, (c_void_p * ranks)())
        self._allreduce = partial(self._finish, found.mpitrain_allreduce, byref(self._stream))

    @property
    def exchanges(self) -> int:
        """How often this rank has posted numbers."""
        return int(self._team.exchanges)

    @exchanges.setter
    def exchanges(self, count: int) -> None:
        self._team.exchanges = count

    def use(self, trades: bool, chunk_bytes: int) -> None:
        """Let chunks pass through the places in another way, see `ways`.  Collective over the node, and a fence.

        Chunks are no larger than a place; places never move, as the NumPy path may be about to use them.
        """
        self.fence()  # nobody is in the middle of a chunk
        team = self._team
        team.trading, team.chunk_bytes = trades, min(chunk_bytes, team.place_bytes)
        team.slow = team.to_memory = 0  # to be found out anew

    def reduction(self, op: str, combines: Sequence[Combine], holds: bool) -> Callable[[], object] | None:
        """Lay out what this rank combines in shared memory, each after a fence; None if there is no loop for it.

        The loops know addresses only: ``holds`` keeps the memory there for as long as what is returned.
        """
        if _operation(combines[0].targets[0].dtype, op, 0) is None:
            return None
        steps = (_Combination * len(combines))(*(_combination(op, each) for each in combines))
        job = _SharedReduction(pointer(self._team), steps, len(combines), 0)
        if holds:
            job.memory = combines
        return partial(self._finish, self._library.mpitrain_reduce_shared, byref(job))

    def streams(self, dtype: DType, op: str) -> bool:
        """Tell whether `allreduce` and `plan` know a reduction."""
        return _operation(dtype, op, 0) is not None

    def hands_over(self, values: Array, op: str) -> bool:
        """Tell whether `plan` hands an array over whole: one fence, wherever it lies, where `reduction` takes two."""
        return values.nbytes <= self._team.slot_bytes and self.streams(values.dtype, op)

    def allreduce(self, op: str, send: Array, recv: Array, post: tuple[int, int, int, int]) -> bool:
        """Post numbers, and reduce contiguous arrays of equal size through the places.  Collective over the node.

        Returns
        -------
        bool
            False where ranks posted different numbers, or blocks that are not −1 and of which no reduction is
            remembered; then nothing was reduced, and `resume` or `give_up` must follow on all of them.
        """
        job = self._stream
        _aim(job, op, send, recv)
        job.post[:] = post
        return self._allreduce() == 0

    @property
    def begin_addresses(self) -> tuple[int, int]:
        """Where compiled code finds what begins an `allreduce`, and its first argument."""
        function = ctypes.cast(self._library.mpitrain_begin_allreduce, c_void_p).value
        assert function is not None
        return function, ctypes.addressof(self._stream)

    def finish(self) -> bool:
        """Wait for the others in an `allreduce` that compiled code has begun, and tell what that tells."""
        return self._allreduce() == 0

    def resume(self) -> None:
        """Reduce what `allreduce` has not."""
        self._finish(self._library.mpitrain_stream, byref(self._stream))

    def give_up(self, handed_in: bool) -> None:
        """Forget what `allreduce` has not reduced; some ranks may have handed in their first chunk, or none has."""
        self._stream.met = self._stream.handed_in = 0
        self._team.chunks += handed_in

    def remember(self, posts: Sequence[int], run: Callable[[], object]) -> None:
        """Let `allreduce` itself perform what `reduction` laid out, by the numbers that all ranks post for it.

        Where there is no room for more, all are forgotten; ranks remember the same, in the same order.
        """
        count = self._team.laid_out_count
        if count == LAID_OUT:
            count = 0
            self._remembered.clear()
        key = (c_int64 * len(posts))(*posts)
        entry = self._table[count]
        entry.posts, entry.reduction = key, ctypes.addressof(run.args[-1]._obj)  # type: ignore[attr-defined]
        self._remembered.append((key, run))
        self._team.laid_out_count, self._team.laid_out_next = count + 1, 0

    def plan(self, op: str, send: Array, recv: Array, divisor: int) -> Callable[[], object]:
        """Return what reduces the same ordinary arrays, which it holds, again and again; all ranks agree on it."""
        job = _Stream(pointer(self._team), None, None, None, (c_void_p * self.ranks)())
        _aim(job, op, send, recv, divisor)
        job.memory = send, recv
        return partial(self._finish, self._library.mpitrain_stream, byref(job))


def _finish(team: _Team, progress: Callable[[], object], function: Callable[[object], int], argument: object) -> int:
    """Call until it is done, and return what it says.

    It comes back now and then while it waits, so that signals are handled here, and messages go on.
    """
    while (said := function(argument)) == AGAIN:
        progress()
        if team.late > _PATIENCE:
            time.sleep(_NAP_S)
    return said


def _combination(op: str, combine: Combine) -> _Combination:
    found = _operation(combine.targets[0].dtype, op, combine.divisor)
    assert found is not None
    parts, results = ((c_void_p * len(each))(*map(address, each)) for each in (combine.sources, combine.targets))
    return _Combination(
        found[1], parts, len(parts), results, len(results), combine.targets[0].nbytes, combine.past_cache
    )  # fmt: skip


def _aim(job: _Stream, op: str, send: Array, recv: Array, divisor: int = 0) -> None:
    """Set the reduction and the arrays of a stream."""
    found = _operation(send.dtype, op, divisor)
    assert found is not None
    job.op, job.source, job.target, job.nbytes = found[1], address(send), address(recv), send.nbytes
    job.past_cache = send is not recv and send.nbytes >= PAST_CACHE_FROM_BYTES


class CompiledFence(Fence):
    """A fence that waits in compiled code.

    Parameters
    ----------
    lines, rank
        As for `Fence`.
    kernel : Kernel
        On the same memory.
    """

    def __init__(self, lines: Array, rank: int, kernel: Kernel) -> None:
        self._kernel = kernel
        super().__init__(lines, rank, None, True)

    def wait(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Return once every rank has come here as often as this one.  Collective over the node."""
        assert meanwhile is None  # of several nodes only, where these loops do not run
        self._kernel.fence()

    @property
    def _exchanges(self) -> int:
        return self._kernel.exchanges

    @_exchanges.setter
    def _exchanges(self, count: int) -> None:
        self._kernel.exchanges = count
