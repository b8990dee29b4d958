"""The short way of a call on one contiguous NumPy array: the same checks as `mpitrain.comm.prepare`, next to no Python.

A function here returns None for everything that is not as plain as that, errors included, and has done nothing then;
the general way takes it from there.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain._errors import DtypeError, InputError
from mpitrain._typing import Array, DType
from mpitrain.arrays.dtypes import accumulator
from mpitrain.comm import dtypes
from mpitrain.comm.calls import Call, Prepared

if TYPE_CHECKING:
    from mpitrain.comm.engine import Engine


class Doing:
    """What the guard shows of a call under way."""

    __slots__ = ("array", "op", "operation", "root")

    def __init__(self, operation: str, array: Array, op: str | None, root: int | None) -> None:
        self.operation, self.array, self.op, self.root = operation, array, op, root

    def prepared(self) -> Prepared:
        """Return the same as the general way has it."""
        call = Call(self.operation, self.array.dtype, recv=self.array.reshape(-1), op=self.op, root=self.root)
        return Prepared(self.operation, [call], lambda: None)

    def __str__(self) -> str:
        return str(self.prepared())


def allreduce(comm: Engine, x: Any, op: str, out: Any) -> Array | None:
    """Reduce over all ranks; see `Communicator.allreduce`."""
    if not (comm.plain and type(op) is str and type(x) is np.ndarray):
        return None
    kind = reduction(x.dtype, op)
    into = _landing(x, out) if kind is not None else None
    if into is None:
        return None
    _perform(comm, Doing("allreduce", into, kind, None), x)
    if op == "mean":
        np.divide(into, comm.size, out=into)
    return into


def broadcast(comm: Engine, x: Any, root: int, out: Any) -> Array | None:
    """Give the root's values to all; see `Communicator.broadcast`."""
    if not (comm.plain and type(root) is int and 0 <= root < comm.size and type(x) is np.ndarray):
        return None
    into = _landing(x, out) if _travels(x.dtype) else None
    if into is None:
        return None
    if into is not x and comm.rank == root:
        np.copyto(into, x)
    _perform(comm, Doing("broadcast", into, None, root), into)
    return into


def _landing(x: Array, out: Any) -> Array | None:
    """Return the memory that results for ``x`` are received in; None where that takes more than this."""
    flags = x.flags
    if not (flags.c_contiguous and flags.aligned):
        return None
    if out is None:
        return np.empty(x.shape, x.dtype)
    if out is x:
        return x if flags.writeable else None
    found: Array | None = out if _fits(out, x) else None
    return found


def _fits(out: Any, x: Array) -> bool:
    """Tell whether results for ``x`` can be received straight into ``out``, which lies elsewhere."""
    return (
        type(out) is np.ndarray
        and out.shape == x.shape
        and out.dtype == x.dtype
        and out.flags.c_contiguous
        and out.flags.writeable
        and out.flags.aligned
        and not np.may_share_memory(out, x)
    )


def _perform(comm: Engine, doing: Doing, send: Array) -> None:
    comm.ledger.count(doing.operation, doing.array.nbytes)
    watch = comm._watch
    outer, watch.current = watch.current, doing
    try:
        if doing.root is None:
            assert doing.op is not None
            comm._allreduce_now(send, doing.array, doing.op)
        else:
            comm._broadcast_now(doing.array, doing.root)
    finally:
        watch.current = outer
        watch.count += 1


@cache
def _travels(dtype: DType) -> bool:
    """Tell whether arrays of this type travel as they are."""
    try:
        dtypes.check("direct", dtype)
    except DtypeError:
        return False
    return dtypes.storage(dtype) == dtype


@cache
def reduction(dtype: DType, op: str) -> str | None:
    """Return what reduces arrays of this type as they are; None if nothing does."""
    try:
        dtypes.check_op("direct", op)
        dtypes.check_op_dtype("direct", op, dtype)
    except (DtypeError, InputError):
        return None
    if not _travels(dtype) or accumulator(dtype) != dtype:
        return None
    return "sum" if op == "mean" else op
