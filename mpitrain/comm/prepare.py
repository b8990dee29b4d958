"""From the arguments of a public method to the calls of a backend: one function per shape of collective.

Each checks what it is given, lays out what is sent and received through `mpitrain.comm.buffers`, and says how the
result is made once the calls are complete.  Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from math import prod
from typing import Any, TypeAlias

import numpy as np

from mpitrain._typing import DType, Shape
from mpitrain.arrays.dtypes import accumulator
from mpitrain.arrays.libraries import NUMPY, Operand, owner
from mpitrain.comm import checks, dtypes, trees
from mpitrain.comm.buffers import Fused, Parcel, accept, apart, outgoing, pack
from mpitrain.comm.calls import Call, Prepared

Counts: TypeAlias = Sequence[int] | None
_Leaf: TypeAlias = tuple[Call, Parcel | None]


def reduction(
    operation: str,
    size: int,
    x: Any,
    op: str,
    out: Any,
    root: int | None,
    receives: bool,
    bucket_bytes: int | None = None,
) -> Prepared:
    """Prepare allreduce (``root`` None) and reduce: fused, in place on the packed buffers."""
    dtypes.check_op(operation, op)
    bucket_bytes = checks.bucket_bytes(operation, bucket_bytes)
    fused = Fused(operation, x, out if receives else None, True, bucket_bytes)
    for parcel in fused.parcels:
        dtypes.check_op_dtype(operation, op, parcel.dtype)
    fused.fill()
    primitive = "allreduce" if root is None else "reduce"
    calls = [
        Call(primitive, dtype=parcel.dtype, recv=parcel.wire, op=_summed(op), root=root, stream=parcel.stream)
        for parcel in fused.parcels
    ]

    def finish() -> Any:
        if not receives:
            return None
        for parcel in fused.parcels:
            _divide(parcel, op, size)
        return fused.result()

    return Prepared(operation, calls, finish, x)


def broadcast(
    operation: str, x: Any, root: int, out: Any, sends: bool, bucket_bytes: int | None = None
) -> Prepared:  # fmt: skip
    """Prepare a broadcast: fused, in place on the packed buffers."""
    fused = Fused(operation, x, out, bucket_bytes=checks.bucket_bytes(operation, bucket_bytes))
    if sends:
        fused.fill()
    calls = [
        Call("broadcast", dtype=parcel.dtype, recv=parcel.wire, root=root, stream=parcel.stream)
        for parcel in fused.parcels
    ]
    return Prepared(operation, calls, fused.result, x)


def gathering(
    operation: str, rank: int, size: int, x: Any, counts: Counts, out: Any, root: int | None
) -> Prepared:  # fmt: skip
    """Prepare allgather (``root`` None) and gather: stacked, or joined along axis 0 with ``counts``."""
    shares = None if counts is None else checks.counts(operation, counts, size)
    receives = root is None or root == rank

    def leaf(array: Operand, into: Any) -> _Leaf:
        if shares is None:
            shape: Shape = (size, *array.shape)
        else:
            checks.rows(operation, array.shape, shares[rank], f"(counts[{rank}])")
            shape = (sum(shares), *array.shape[1:])
        parcel = pack(operation, [shape], [array], [into]) if receives else None
        recv = parcel.wire if parcel else None
        return Call(
            "allgather" if root is None else "gather", dtype=array.dtype, send=outgoing(array, apart_from=recv),
            recv=recv, root=root, counts=_elements(shares, array.shape[1:]), stream=array.stream,
        ), parcel  # fmt: skip

    return _leafwise(operation, x, out if receives else None, leaf, receives=receives)


def reduce_scatter(operation: str, rank: int, size: int, x: Any, op: str, counts: Counts, out: Any) -> Prepared:
    """Prepare a reduction of which each rank gets its share of the rows."""
    dtypes.check_op(operation, op)
    shares = None if counts is None else checks.counts(operation, counts, size)

    def leaf(array: Operand, into: Any) -> _Leaf:
        dtypes.check_op_dtype(operation, op, array.dtype)
        shape = share_shape(operation, array.shape, rank, size, shares)
        parcel = pack(operation, [shape], [array], [into], reduces=True)
        send = outgoing(array, accumulator(array.dtype), apart_from=parcel.wire)
        return Call(
            "reduce_scatter", dtype=array.dtype, send=send, recv=parcel.wire, op=_summed(op),
            counts=_elements(shares, array.shape[1:]), stream=array.stream,
        ), parcel  # fmt: skip

    return _leafwise(operation, x, out, leaf, lambda parcel: _divide(parcel, op, size))


@dataclass(frozen=True)
class Spec:
    """Dtype and shape of an array that another rank holds."""

    dtype: DType
    shape: Shape


def scatter_header(operation: str, size: int, x: Any, counts: Counts) -> tuple[Any, tuple[int, ...] | None]:
    """Return what the other ranks must know of the root's arrays: a tree of `Spec`, and rows per rank."""
    arrays = [accept(operation, array) for array in trees.leaves(x, operation)]
    shares = None if counts is None else checks.counts(operation, counts, size)
    return trees.rebuild(x, [Spec(array.dtype, array.shape) for array in arrays]), shares


def placeholders(specs: Any, model: Any) -> Any:
    """Return a tree of arrays of the given dtypes and shapes that take no memory.

    Parameters
    ----------
    specs : tree of Spec
    model : tree of arrays, or anything else
        Whose library the results are to be of; NumPy's where it does not fit.
    """
    models = trees.leaves(model) if trees.alike(specs, model) else repeat(None)
    return trees.rebuild(specs, [_placeholder(*each) for each in zip(trees.leaves(specs), models, strict=False)])


def _placeholder(spec: Spec, model: Any) -> Operand:
    library = owner(model) or NUMPY
    on_device = library.stream(model) is not None
    empty = None if on_device else np.broadcast_to(np.empty((), spec.dtype), spec.shape)
    return Operand(model, library, empty, spec.dtype, spec.shape)


def scatter(
    operation: str, rank: int, size: int, whole: Any, root: int, shares: tuple[int, ...] | None, out: Any
) -> Prepared:  # fmt: skip
    """Prepare a scatter; off the root, only the dtypes and shapes of ``whole`` are looked at."""

    def leaf(array: Operand, into: Any) -> _Leaf:
        shape = share_shape(operation, array.shape, rank, size, shares)
        parcel = pack(operation, [shape], [array], [into])
        send = outgoing(array, apart_from=parcel.wire) if rank == root else None
        return Call(
            "scatter", dtype=array.dtype, send=send, recv=parcel.wire, root=root,
            counts=_elements(shares, array.shape[1:]), stream=array.stream,
        ), parcel  # fmt: skip

    return _leafwise(operation, whole, out, leaf)


def alltoall(
    operation: str, size: int, x: Any, shares: tuple[int, ...] | None, recv_shares: tuple[int, ...] | None, out: Any
) -> Prepared:  # fmt: skip
    """Prepare an exchange of rows between all ranks."""

    def leaf(array: Operand, into: Any) -> _Leaf:
        if shares is None or recv_shares is None:
            checks.rows(operation, array.shape, size, "(one row per rank)")
            shape = array.shape
        else:
            checks.rows(operation, array.shape, sum(shares), "(the sum of counts)")
            shape = (sum(recv_shares), *array.shape[1:])
        parcel = pack(operation, [shape], [array], [into])
        send = outgoing(array, apart_from=parcel.wire)
        # Other ranks' counts are unknown here, so that these must not be taken for equal shares.
        return Call(
            "alltoall", dtype=array.dtype, send=send, recv=parcel.wire,
            counts=_exact(shares, array.shape[1:]), recv_counts=_exact(recv_shares, array.shape[1:]),
            stream=array.stream,
        ), parcel  # fmt: skip

    return _leafwise(operation, x, out, leaf)


def send(operation: str, x: Any, dest: int, tag: int) -> Prepared:
    """Prepare one message per array of a tree."""
    arrays = [accept(operation, leaf) for leaf in trees.leaves(x, operation)]
    calls = [
        Call("send", dtype=array.dtype, send=outgoing(array), peer=dest, tag=tag, stream=array.stream)
        for array in arrays
    ]
    return Prepared(operation, calls, lambda: None, x)


def recv(operation: str, like: Any, source: int, tag: int, out: Any) -> Prepared:
    """Prepare the receipt of one message per array of a tree."""

    def leaf(array: Operand, into: Any) -> _Leaf:
        parcel = pack(operation, [array.shape], [array], [into])
        return Call(
            "recv", dtype=array.dtype, recv=parcel.wire, peer=source, tag=tag, stream=array.stream
        ), parcel  # fmt: skip

    return _leafwise(operation, like, out, leaf)


def share_shape(operation: str, shape: Shape, rank: int, size: int, shares: tuple[int, ...] | None) -> Shape:
    """Return the shape of a rank's share of an array: its row without ``shares``, its rows with."""
    if shares is None:
        checks.rows(operation, shape, size, "(one row per rank; or give counts)")
        return shape[1:]
    checks.rows(operation, shape, sum(shares), "(the sum of counts)")
    return (shares[rank], *shape[1:])


def _leafwise(
    operation: str,
    x: Any,
    out: Any,
    leaf: Callable[[Operand, Any], _Leaf],
    complete: Callable[[Parcel], None] = lambda parcel: None,
    receives: bool = True,
) -> Prepared:
    """Prepare a collective that treats each array of a tree by itself."""
    outs = trees.leaves_like(operation, x, out)
    arrays = apart(operation, [accept(operation, array) for array in trees.leaves(x, operation)], outs)
    pairs = [leaf(*each) for each in zip(arrays, outs, strict=True)]
    parcels = [parcel for _, parcel in pairs if parcel is not None]

    def finish() -> Any:
        if not receives:
            return None
        for parcel in parcels:
            complete(parcel)
        return trees.rebuild(x, (parcel.results()[0] for parcel in parcels))

    return Prepared(operation, [call for call, _ in pairs], finish, x)


def _elements(shares: tuple[int, ...] | None, row: Shape) -> tuple[int, ...] | None:
    """Turn rows per rank into elements per rank; None where all are equal, for which libraries have faster paths."""
    return None if shares is None or len(set(shares)) == 1 else _exact(shares, row)


def _exact(shares: tuple[int, ...] | None, row: Shape) -> tuple[int, ...] | None:
    return None if shares is None else tuple(share * prod(row) for share in shares)


def _summed(op: str) -> str:
    return "sum" if op == "mean" else op


def _divide(parcel: Parcel, op: str, size: int) -> None:
    if op == "mean":
        parcel.divide(size)
