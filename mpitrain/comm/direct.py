"""The short way of a call on one contiguous NumPy array: the same checks as `mpitrain.comm.prepare`, next to no Python.

A function here returns None for everything that is not as plain as that, errors included, and has done nothing then;
the general way takes it from there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain._errors import DtypeError, InputError
from mpitrain._typing import Array, DType, Shape
from mpitrain.arrays.dtypes import accumulator, storage
from mpitrain.comm import dtypes, results
from mpitrain.comm.calls import Call, Prepared

if TYPE_CHECKING:
    from mpitrain.comm.engine import Engine


class Doing:
    """What the guard shows of a call under way."""

    __slots__ = ("op", "operation", "recv", "root", "send")

    def __init__(
        self, operation: str, recv: Array, op: str | None = None, root: int | None = None, send: Array | None = None
    ) -> None:
        self.operation, self.recv, self.op, self.root, self.send = operation, recv, op, root, send

    def prepared(self) -> Prepared:
        """Return the same as the general way has it."""
        send = None if self.send is None else self.send.reshape(-1)
        kind = self.operation.removesuffix("_plan")
        call = Call(kind, self.recv.dtype, send, self.recv.reshape(-1), self.op, self.root)
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
    assert kind is not None
    _perform(comm, Doing("allreduce", into, kind), into.nbytes, comm._allreduce_now, x, into, kind)
    if op == "mean":
        np.divide(into, comm.size, out=into)
    return into


def reduce(comm: Engine, x: Any, op: str, root: int, out: Any) -> Array | None:
    """Reduce over all ranks, for the root; see `Communicator.reduce`.  Returns ``x`` on the others."""
    if not (comm.plain and type(op) is str and type(root) is int and 0 <= root < comm.size and _is_plain(x)):
        return None
    kind = reduction(x.dtype, op)
    into = x if comm.rank != root else _landing(x, out)
    if kind is None or into is None:
        return None
    _perform(comm, Doing("reduce", into, kind, root), into.nbytes, comm._reduce_now, x, into, kind, root)
    if op == "mean" and comm.rank == root:
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
    _perform(comm, Doing("broadcast", into, root=root), into.nbytes, comm._broadcast_now, into, root)
    return into


def reduce_scatter(comm: Engine, x: Any, op: str, out: Any) -> Array | None:
    """Reduce over all ranks, a row for each; see `Communicator.reduce_scatter`."""
    if not (comm.plain and type(op) is str and _is_plain(x)):
        return None
    kind = reduction(x.dtype, op)
    if kind is None or x.shape[:1] != (comm.size,):
        return None
    into = _apart(x, x.shape[1:], out)
    if into is None:
        return None
    doing = Doing("reduce_scatter", into, kind, send=x)
    _perform(comm, doing, x.nbytes, comm._reduce_scatter_now, x, into, kind)
    if op == "mean":
        np.divide(into, comm.size, out=into)
    return into


def allgather(comm: Engine, x: Any, out: Any) -> Array | None:
    """Collect the arrays of all ranks; see `Communicator.allgather`."""
    if not (comm.plain and _is_plain(x) and _travels(x.dtype)):
        return None
    into = _apart(x, (comm.size, *x.shape), out)
    if into is None:
        return None
    _perform(comm, Doing("allgather", into, send=x), into.nbytes, comm._allgather_now, x, into)
    return into


def _is_plain(x: Any) -> bool:
    return type(x) is np.ndarray and x.flags.c_contiguous and x.flags.aligned


def _apart(x: Array, shape: Shape, out: Any) -> Array | None:
    """Return the memory that a result of another shape is received in; None where that takes more than this."""
    if out is None:
        return results.empty(shape, x.dtype)
    found: Array | None = out if _fits(out, shape, x) else None
    return found


def _landing(x: Array, out: Any) -> Array | None:
    """Return the memory that results for ``x`` are received in; None where that takes more than this."""
    if not _is_plain(x):
        return None
    if out is x:
        return x if x.flags.writeable else None
    return _apart(x, x.shape, out)


def _fits(out: Any, shape: Shape, x: Array) -> bool:
    """Tell whether results for ``x`` can be received straight into ``out``, which lies elsewhere."""
    return (
        type(out) is np.ndarray
        and out.shape == shape
        and out.dtype == x.dtype
        and out.flags.c_contiguous
        and out.flags.writeable
        and out.flags.aligned
        and not np.may_share_memory(out, x)
    )


def _perform(comm: Engine, doing: Doing, nbytes: int, run: Callable[..., None], *arguments: Any) -> None:
    comm.ledger.count(doing.operation, nbytes)
    watch = comm._watch
    outer, watch.current = watch.current, doing
    try:
        run(*arguments)
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
    return storage(dtype) == dtype


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
