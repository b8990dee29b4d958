"""Reductions and gathers of shards that are checked and laid out once, and then cost next to no Python.

Between the two, every rank works on the shard that it owns.  In memory that the ranks of a node share neither sends
anything within the node: `mpitrain.comm.transports.sharding`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.arrays.namespace import is_cupy, namespace
from mpitrain.comm import plan
from mpitrain.comm.calls import Call, Prepared
from mpitrain.comm.transports.shards import bounds

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator


class ReduceScatterPlan:
    """What `Communicator.reduce_scatter_plan` returns; calling it reduces what the buffers hold then.

    Attributes
    ----------
    begin, end : int
        The elements that this rank owns.  In which order ranks own them depends on where they run, if not asked for.
    shard : array, shape (end - begin,)
        What every call returns: the same memory each time, which may be a part of the buffer.

    Notes
    -----
    Calls are collective.
    """

    __slots__ = ("_run", "begin", "end", "shard")

    def __init__(self, run: Callable[[], object], begin: int, end: int, shard: Array) -> None:
        self._run, self.begin, self.end, self.shard = run, begin, end, shard

    def __call__(self) -> Array:
        """Reduce what the buffers hold now, and return this rank's shard.  Collective."""
        self._run()
        return self.shard


class AllgatherPlan:
    """What `Communicator.allgather_plan` returns; calling it gives every rank what each has written to its shard.

    Attributes
    ----------
    buffer : array
        What every call returns.

    Notes
    -----
    Calls are collective.
    """

    __slots__ = ("_run", "buffer")

    def __init__(self, run: Callable[[], object], buffer: Array) -> None:
        self._run, self.buffer = run, buffer

    def __call__(self) -> Array:
        """Return the buffer once every rank's shard is in it.  Collective."""
        self._run()
        return self.buffer


def reduce_scatter(comm: Communicator, buffer: Array, op: str, in_rank_order: bool) -> ReduceScatterPlan:
    """Plan a reduction of which each rank gets a shard.  Collective."""
    checked = _flat("reduce_scatter_plan", buffer)
    cuts = bounds(checked.size, comm.size, checked.itemsize)
    begin, end = cuts[comm.rank], cuts[comm.rank + 1]
    if not is_cupy(checked):
        plan.check(checked, op, "reduce_scatter_plan")
        planned = comm._moves().plan_reduce_scatter(checked, op)
        if planned is not None and in_rank_order and not _all(comm, (planned.begin, planned.end) == (begin, end)):
            planned = None
        if planned is not None:
            call = Call("reduce_scatter", dtype=checked.dtype, send=checked, recv=planned.shard, op=op)
            run = watched(comm, Prepared("reduce_scatter_plan", [call], lambda: None, checked), planned.run)
            return ReduceScatterPlan(run, planned.begin, planned.end, planned.shard)
    if comm.size == 1:
        return ReduceScatterPlan(partial(comm._watch.check_open, "reduce_scatter_plan"), begin, end, checked)
    counts = [after - before for before, after in pairwise(cuts)]
    shard: Array = namespace(checked).empty(end - begin, checked.dtype)
    return ReduceScatterPlan(partial(comm.reduce_scatter, checked, op, counts, shard), begin, end, shard)


def allgather(comm: Communicator, buffer: Array, begin: int, end: int) -> AllgatherPlan:
    """Plan a gather of shards that the ranks write where they belong.  Collective."""
    whole = _flat("allgather_plan", buffer)
    owned = comm.allgather_object((begin, end))
    _check_tiles(owned, whole.size)
    counts = tuple(stop - start for start, stop in owned)
    if not is_cupy(whole):
        planned = comm._moves().plan_allgather(whole, begin, end)
        if planned is not None:
            call = Call("allgather", dtype=whole.dtype, send=whole[begin:end], recv=whole, counts=counts)
            return AllgatherPlan(watched(comm, Prepared("allgather_plan", [call], lambda: None, whole), planned), whole)
    if comm.size == 1:
        return AllgatherPlan(partial(comm._watch.check_open, "allgather_plan"), whole)
    if owned != sorted(owned):
        raise InputError("the ranks' shards are not in the order of the ranks", operation="allgather_plan", got=owned)
    return AllgatherPlan(partial(comm.allgather, whole[begin:end], counts, whole), whole)


def _all(comm: Communicator, good: bool) -> bool:
    return bool(comm.allreduce(np.uint8(good), "min"))


def _flat(operation: str, buffer: Any) -> Array:
    """Return an array that a plan can hold on to, which is one-dimensional and contiguous."""
    if not (isinstance(buffer, np.ndarray) or is_cupy(buffer)):
        raise InputError("not an array", operation=operation, got=type(buffer).__name__, expected="of NumPy or CuPy")
    if buffer.ndim != 1 or not buffer.flags.c_contiguous:
        raise InputError(
            "the buffer is not one contiguous run", operation=operation, got=f"shape {buffer.shape}",
            expected="a one-dimensional, contiguous array", remedy="pass buffer.reshape(-1) of a contiguous one",
        )  # fmt: skip
    found: Array = buffer
    return found


def _check_tiles(owned: list[tuple[int, int]], size: int) -> None:
    ends = [0, *(stop for start, stop in sorted(owned) if start < stop)]
    starts = [*(start for start, stop in sorted(owned) if start < stop), size]
    if starts != ends or any(start > stop for start, stop in owned):
        raise InputError(
            "the ranks' shards do not make up the buffer", operation="allgather_plan", got=owned,
            expected=f"ranges that cover {size} elements once",
        )  # fmt: skip


def watched(comm: Communicator, called: Prepared, run: Callable[[], object]) -> Callable[[], None]:
    """Return what performs a planned call in sight of guard, ledger and debug mode."""
    watch, meter = comm._watch, comm.ledger.meter(called)

    def perform() -> None:
        watch.check_open(called.operation)
        outer, watch.current = watch.current, called
        try:
            if comm._checker is not None:
                comm._checker.meet(called)
            run()
        finally:
            watch.current = outer
            watch.count += 1
        meter.uses += 1

    return perform
