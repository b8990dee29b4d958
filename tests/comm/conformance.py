"""Checks that any communicator must pass, whatever its backend: each is called with a communicator, on every rank.

Values are small integers, so that results are exact in every dtype and in any order; the expected ones are written
down from the rule by which each rank's input is made, with no communicator in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mpitrain import _errors
from mpitrain.comm import Communicator

DTYPES = [
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
    ml_dtypes.bfloat16,
]
SHAPES: list[tuple[int, ...]] = [(), (1,), (5,), (2, 3), (0,), (3, 0, 2)]
FOLDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda stack: stack.sum(0),
    "prod": lambda stack: stack.prod(0),
    "min": lambda stack: stack.min(0),
    "max": lambda stack: stack.max(0),
    "mean": lambda stack: stack.mean(0),
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
}
CHECKS: list[Callable[[Communicator], None]] = []


def check(function: Callable[[Communicator], None]) -> Callable[[Communicator], None]:
    CHECKS.append(function)
    return function


def values(rank: int, shape: tuple[int, ...], dtype: Any = "float64") -> np.ndarray:
    """What a rank puts in: 1, 2, 3, shifted by the rank."""
    count = int(np.prod(shape))
    return ((np.arange(count) + rank) % 3 + 1).reshape(shape).astype(dtype)


def same(got: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    assert isinstance(got, np.ndarray)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert np.array_equal(got, expected), f"got {got}, expected {expected}"


def ops(dtype: Any) -> Iterator[str]:
    """The reductions that a dtype has."""
    yield from ("sum", "prod")
    kind = np.dtype(dtype).kind
    yield from () if kind == "c" else ("min", "max")
    yield from ("and", "or") if kind in "iu" else ("mean",)


def folded(size: int, shape: tuple[int, ...], dtype: Any, op: str) -> np.ndarray:
    """The serial result: in float64, complex128 or int64, over a stack of every rank's values."""
    wide = np.result_type(np.complex128 if np.dtype(dtype).kind == "c" else np.int64)
    wide = np.dtype(np.float64) if op == "mean" and wide.kind == "i" else wide
    stack = np.stack([values(r, shape, dtype).astype(wide) for r in range(size)])
    result = FOLDS[op](stack)
    if op == "mean" and np.dtype(dtype).itemsize <= 4 and np.dtype(dtype).kind != "c":
        return (stack.sum(0).astype(np.float32) / np.float32(size)).astype(dtype)
    if op == "mean":
        return (stack.sum(0).astype(dtype) / size).astype(dtype)
    return np.asarray(result).astype(dtype)


@check
def allreduce_every_dtype_op_and_shape(comm: Communicator) -> None:
    for dtype, shape in product(DTYPES, SHAPES):
        for op in ops(dtype):
            x = values(comm.rank, shape, dtype)
            before = x.copy()
            same(comm.allreduce(x, op), folded(comm.size, shape, dtype, op))
            same(x, before)


@check
def allreduce_of_bool(comm: Communicator) -> None:
    x = np.array([True, comm.rank == 0, False])
    same(comm.allreduce(x, "or"), [True, True, False])
    same(comm.allreduce(x, "and"), [True, comm.size == 1, False])
    same(comm.allreduce(x, "max"), [True, True, False])
    same(comm.allreduce(x, "min"), [True, comm.size == 1, False])


@check
def reduce_to_every_root(comm: Communicator) -> None:
    for root, dtype, op in product(range(comm.size), ("float32", "float16", "int64"), ("sum", "max")):
        got = comm.reduce(values(comm.rank, (2, 3), dtype), op, root=root)
        if comm.rank == root:
            same(got, folded(comm.size, (2, 3), dtype, op))
        else:
            assert got is None


@check
def reduce_fills_out_on_the_root_alone(comm: Communicator) -> None:
    for root, op, elements in product(range(comm.size), ("sum", "mean", "min"), (0, 3, 5000)):
        expected = folded(comm.size, (elements,), "float64", op)
        x, out = values(comm.rank, (elements,)), np.full(elements, -7.0)
        x.flags.writeable = False
        got = comm.reduce(x, op, root, out)
        assert got is (out if comm.rank == root else None)
        same(out, expected if comm.rank == root else np.full(elements, -7.0))
        same(x, values(comm.rank, (elements,)))
        x = values(comm.rank, (elements,))
        got = comm.reduce(x, op, root, out=x)
        assert got is (x if comm.rank == root else None)
        same(x, expected if comm.rank == root else values(comm.rank, (elements,)))


@check
def broadcast_from_every_root(comm: Communicator) -> None:
    for root, dtype, shape in product(range(comm.size), [*DTYPES, "bool"], SHAPES):
        x = values(comm.rank, shape, dtype)
        same(comm.broadcast(x, root), values(root, shape, dtype))
        same(x, values(comm.rank, shape, dtype))


@check
def gather_and_allgather(comm: Communicator) -> None:
    for dtype, shape in product([*DTYPES, "bool"], SHAPES):
        x = values(comm.rank, shape, dtype)
        expected = np.stack([values(r, shape, dtype) for r in range(comm.size)])
        same(comm.allgather(x), expected)
        root = comm.size - 1
        got = comm.gather(x, root)
        same(got, expected) if comm.rank == root else same(np.asarray(got is None), True)


def shards(size: int, rows: int = 7) -> list[int]:
    """Rows per rank, uneven; the first rank has none where there are three or more."""
    counts = [rows // size + (r < rows % size) for r in range(size)]
    return counts if size < 3 else [0, counts[0] + counts[1], *counts[2:]]


def own_rows(counts: list[int], rank: int) -> slice:
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


@check
def ragged_gather_and_scatter(comm: Communicator) -> None:
    counts = shards(comm.size)
    for dtype, row in product(("float32", "float16", "bool", "int64"), [(), (2,), (0,), (2, 3)]):
        whole = values(0, (7, *row), dtype)
        own = whole[own_rows(counts, comm.rank)]
        same(comm.allgather(own, counts), whole)
        for root in range(comm.size):
            got = comm.gather(own, root, counts)
            same(got, whole) if comm.rank == root else same(np.asarray(got is None), True)
            same(comm.scatter(whole if comm.rank == root else None, root, counts), own)


@check
def scatter_rows(comm: Communicator) -> None:
    for root, dtype, row in product(range(comm.size), ("float64", ml_dtypes.bfloat16, "bool"), [(), (3,), (0, 2)]):
        whole = values(root, (comm.size, *row), dtype)
        same(comm.scatter(whole if comm.rank == root else None, root), whole[comm.rank])


@check
def reduce_scatter_even_and_ragged(comm: Communicator) -> None:
    counts = shards(comm.size)
    for dtype, op in product(("float32", "float16", ml_dtypes.bfloat16, "int32"), ("sum", "max", "prod")):
        x = values(comm.rank, (comm.size, 2, 2), dtype)
        same(comm.reduce_scatter(x, op), folded(comm.size, (comm.size, 2, 2), dtype, op)[comm.rank])
        x = values(comm.rank, (7, 2), dtype)
        expected = folded(comm.size, (7, 2), dtype, op)[own_rows(counts, comm.rank)]
        same(comm.reduce_scatter(x, op, counts), expected)
    x = values(comm.rank, (comm.size, 3))
    same(comm.reduce_scatter(x, "mean"), folded(comm.size, (comm.size, 3), "float64", "mean")[comm.rank])


@check
def alltoall_even_and_ragged(comm: Communicator) -> None:
    x = np.array([[10 * comm.rank + dest, 0] for dest in range(comm.size)])
    same(comm.alltoall(x), np.array([[10 * source + comm.rank, 0] for source in range(comm.size)]))
    for dtype in ("float32", "float16", "bool"):
        # Rank s sends s + d rows of the value s to rank d; rank 0 sends itself none.
        counts = [comm.rank + dest for dest in range(comm.size)]
        x = np.full((sum(counts), 2), comm.rank, dtype)
        sources = [source for source in range(comm.size) for _ in range(source + comm.rank)]
        expected = np.repeat(np.array(sources, dtype).reshape(-1, 1), 2, axis=1)
        same(comm.alltoall(x, counts), expected)
        same(comm.alltoall(x, counts, recv_counts=counts), expected)
        same(comm.ialltoall(x, counts, counts).wait(), expected)


@check
def strided_inputs(comm: Communicator) -> None:
    base = values(comm.rank, (6, 4))
    views: list[Callable[[np.ndarray], np.ndarray]] = [lambda a: a[::2], lambda a: a.T, lambda a: a[::-1, 1:3]]
    for view in views:
        x = view(base)
        everyones = np.stack([view(values(r, (6, 4))) for r in range(comm.size)])
        same(comm.allreduce(x), everyones.sum(0))
        same(comm.allgather(x), everyones)
        same(comm.broadcast(x, comm.size - 1), everyones[-1])
    readonly = values(comm.rank, (3,))
    readonly.flags.writeable = False
    same(comm.allreduce(readonly), folded(comm.size, (3,), "float64", "sum"))
    same(comm.allreduce(np.asfortranarray(base)), folded(comm.size, (6, 4), "float64", "sum"))


@check
def numbers_are_arrays(comm: Communicator) -> None:
    same(comm.allreduce(comm.rank + 1), comm.size * (comm.size + 1) // 2)
    same(comm.allreduce(0.5), 0.5 * comm.size)
    same(comm.allreduce(comm.rank == 0, "or"), True)
    same(comm.broadcast(np.float32(comm.rank), comm.size - 1), np.float32(comm.size - 1))


@check
def out_is_filled_and_returned(comm: Communicator) -> None:
    total = folded(comm.size, (4, 3), "float32", "sum")
    x = values(comm.rank, (4, 3), "float32")
    for out in (np.zeros((4, 3), np.float32), np.zeros((4, 6), np.float32)[:, ::2], np.zeros((3, 4), np.float32).T):
        assert comm.allreduce(x, out=out) is out
        same(out, total)
    assert comm.allreduce(x, out=x) is x
    same(x, total)
    strided = values(comm.rank, (4, 6), "float32")[:, ::2]
    expected = np.stack([values(r, (4, 6), "float32")[:, ::2] for r in range(comm.size)]).sum(0)
    same(comm.allreduce(strided, out=strided), expected)
    half = values(comm.rank, (5,), "float16")
    same(comm.allreduce(half, out=half), folded(comm.size, (5,), "float16", "sum"))


@check
def out_may_overlap_the_input(comm: Communicator) -> None:
    x = values(comm.rank, (4,))
    everyones = [values(r, (4,)) for r in range(comm.size)]
    same(comm.allreduce(x, out=x[::-1]), np.sum(everyones, axis=0)[:])
    rows = np.zeros((comm.size, 2))
    rows[comm.rank] = comm.rank + 1
    same(comm.allgather(rows[comm.rank], out=rows), np.repeat(np.arange(1.0, comm.size + 1)[:, None], 2, axis=1))
    x = np.full((comm.size, 2), float(comm.rank))
    same(comm.alltoall(x, out=x), np.repeat(np.arange(float(comm.size))[:, None], 2, axis=1))


@check
def out_of_every_collective(comm: Communicator) -> None:
    x, rows = values(comm.rank, (3,)), values(comm.rank, (comm.size, 3))
    calls: list[Callable[..., Any]] = [
        lambda out: comm.broadcast(x, out=out),
        lambda out: comm.allgather(x, out=out),
        lambda out: comm.reduce_scatter(rows, out=out),
        lambda out: comm.alltoall(rows, out=out),
        lambda out: comm.scatter(rows, out=out),
    ]
    for call in calls:
        expected = call(None)
        out = np.full(expected.shape, -1.0)
        assert call(out) is out
        same(out, expected)


@check
def trees_are_fused_by_dtype(comm: Communicator) -> None:
    def tree(rank: int) -> dict[str, Any]:
        return {
            "weight": values(rank, (2, 3), "float32"),
            "more": [values(rank, (4,), "float32"), (values(rank, (), "int64"), values(rank, (2,), "float16"))],
            "empty": np.empty((0, 2), "float32"),
        }

    x = tree(comm.rank)
    if comm.rank % 2:
        x = dict(reversed(x.items()))  # ranks may have filled it in different order
    comm.ledger.reset()
    got = comm.allreduce(x)
    assert [count.messages for count in comm.ledger.snapshot().values() if count.calls] == [3]
    assert list(got) == list(x)
    assert isinstance(got["more"], list)
    assert isinstance(got["more"][1], tuple)
    same(got["weight"], folded(comm.size, (2, 3), "float32", "sum"))
    same(got["more"][0], folded(comm.size, (4,), "float32", "sum"))
    same(got["more"][1][0], folded(comm.size, (), "int64", "sum"))
    same(got["more"][1][1], folded(comm.size, (2,), "float16", "sum"))
    same(got["empty"], np.empty((0, 2), "float32"))
    assert comm.allreduce(x, out=x)["weight"] is x["weight"]
    same(x["more"][1][0], folded(comm.size, (), "int64", "sum"))
    last = comm.broadcast(tree(comm.rank), comm.size - 1)
    same(last["more"][0], values(comm.size - 1, (4,), "float32"))
    assert comm.allreduce({}) == {}


@check
def trees_leaf_by_leaf(comm: Communicator) -> None:
    x = {"a": values(comm.rank, (2,)), "b": (values(comm.rank, (3,), "int32"),)}
    got = comm.allgather(x)
    same(got["a"], np.stack([values(r, (2,)) for r in range(comm.size)]))
    same(got["b"][0], np.stack([values(r, (3,), "int32") for r in range(comm.size)]))
    whole = {"x": values(0, (7, 2)), "y": values(1, (7,), "int64")}
    counts = shards(comm.size)
    part = comm.scatter(whole if comm.rank == 0 else None, 0, counts)
    same(part["x"], whole["x"][own_rows(counts, comm.rank)])
    same(part["y"], whole["y"][own_rows(counts, comm.rank)])


@check
def only_the_root_gets_a_tree_without_arrays(comm: Communicator) -> None:
    root = comm.size - 1
    for empty in ([], {"a": None}):
        expected = empty if comm.rank == root else None
        assert comm.gather(empty, root) == expected
        assert comm.reduce(empty, root=root) == expected


@check
def sixteen_bits_accumulate_in_float32(comm: Communicator) -> None:
    # 2048 + 1 is 2048 in float16, and 256 + 1 is 256 in bfloat16: adding one rank after the other loses every 1.
    for dtype, big in ((np.float16, 2048.0), (ml_dtypes.bfloat16, 256.0)):
        x = np.array([big if comm.rank == 0 else 1.0], dtype)
        expected = np.array([big + comm.size - 1]).astype(dtype)
        same(comm.allreduce(x), expected)
        rows = np.tile(x, (comm.size, 1))
        same(comm.reduce_scatter(rows), expected)
    assert np.isinf(comm.allreduce(np.float16(65504.0))) == (comm.size > 1)


@check
def messages(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for dtype in ("float64", "float16", "bool"):
        x = values(comm.rank, (3, 2), dtype)[:, ::-1]
        same(comm.sendrecv(x, right, left), values(left, (3, 2), dtype)[:, ::-1])
        request = comm.isend(x, right, tag=7)
        out = np.zeros((3, 2), dtype)
        assert comm.recv(out, left, tag=7, out=out) is out
        request.wait()
        same(out, values(left, (3, 2), dtype)[:, ::-1])
    if comm.size > 1 and comm.rank == 0:
        comm.send({"a": np.arange(3), "b": [np.float32(4)]}, 1)
    if comm.rank == 1:
        got = comm.recv({"a": np.zeros(3, np.int64), "b": [np.float32(0)]}, 0)
        same(got["a"], np.arange(3))
        same(got["b"][0], np.float32(4))


@check
def messages_keep_order_and_tags(comm: Communicator) -> None:
    if comm.rank == 0 and comm.size > 1:
        requests = [comm.isend(np.array([i]), comm.size - 1, tag=i % 2) for i in range(6)]
        for request in requests:
            request.wait()
    if comm.rank == comm.size - 1 and comm.size > 1:
        like = np.zeros(1, np.int64)
        requests = [comm.irecv(like, 0, tag=tag) for tag in (1, 0, 1, 0, 1, 0)]
        assert [int(request.wait()[0]) for request in requests] == [1, 0, 3, 2, 5, 4]


@check
def nonblocking_twins(comm: Communicator) -> None:
    x = values(comm.rank, (comm.size, 3), "float16")
    requests = [
        comm.iallreduce(x),
        comm.ireduce(x, "max", root=comm.size - 1),
        comm.ibroadcast(x, comm.size - 1),
        comm.ireduce_scatter(x),
        comm.iallgather(x),
        comm.ialltoall(x),
        comm.ibarrier(),
    ]
    got = [request.wait() for request in requests]
    total = folded(comm.size, x.shape, "float16", "sum")
    same(got[0], total)
    if comm.rank == comm.size - 1:
        same(got[1], folded(comm.size, x.shape, "float16", "max"))
    same(got[2], values(comm.size - 1, x.shape, "float16"))
    same(got[3], total[comm.rank])
    same(got[4], np.stack([values(r, x.shape, "float16") for r in range(comm.size)]))
    same(got[5], np.stack([values(r, x.shape, "float16")[comm.rank] for r in range(comm.size)]))
    assert requests[0].wait() is got[0]
    assert requests[0].test()


@check
def a_message_to_oneself_of_another_size(comm: Communicator) -> None:
    for length in (2, 4):
        with pytest.raises(_errors.MismatchError):
            comm.sendrecv(np.ones(3), comm.rank, comm.rank, like=np.ones(length))
    same(comm.sendrecv(np.ones(3), comm.rank, comm.rank), np.ones(3))


@check
def dropped_requests_keep_their_buffers(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for step in range(20):
        comm.isend(np.full(50_000, step, np.int64), right)  # larger than what MPI copies at once
    for step in range(20):
        same(comm.recv(np.zeros(50_000, np.int64), left), np.full(50_000, step))


@check
def python_objects(comm: Communicator) -> None:
    everyones = [{"rank": r, "text": "x" * r} for r in range(comm.size)]
    own = everyones[comm.rank]
    assert comm.allgather_object(own) == everyones
    for root in range(comm.size):
        assert comm.broadcast_object(own, root) == everyones[root]
        assert comm.gather_object(own, root) == (everyones if comm.rank == root else None)
        assert comm.scatter_object(everyones if comm.rank == root else None, root) == own
    if comm.size > 1 and comm.rank == 0:
        comm.send_object(own, 1, tag=3)
    if comm.rank == 1:
        assert comm.recv_object(0, tag=3) == everyones[0]


@check
def splits_are_communicators(comm: Communicator) -> None:
    half = comm.split(comm.rank % 2, key=-comm.rank)
    assert half is not None
    members = [r for r in range(comm.size) if r % 2 == comm.rank % 2][::-1]
    assert (half.size, members[half.rank]) == (len(members), comm.rank)
    same(half.allreduce(comm.rank), sum(members))
    assert half.allgather_object(comm.rank) == members
    only = comm.split(0 if comm.rank == 0 else None)
    assert (only is None) == (comm.rank != 0)
    with half:
        half.barrier()
    with pytest.raises(_errors.CommunicationError, match="freed"):
        half.barrier()


@check
def node_and_leaders(comm: Communicator) -> None:
    node, leaders = comm.node, comm.leaders
    assert comm.node is node
    assert (leaders is None) == (node.rank != 0)
    assert comm.leaders is leaders
    sizes = comm.allgather_object(leaders.size if leaders else None)
    assert sum(size is not None for size in sizes) == max(size for size in sizes if size)


@check
def ledger_counts_by_axis_and_operation(comm: Communicator) -> None:
    half = comm.split(0, axis="data")
    assert half is not None
    comm.ledger.reset()
    comm.allreduce(np.zeros(10, np.float16))
    comm.iallgather(np.zeros(2)).wait()
    half.broadcast({"a": np.zeros(3), "b": np.zeros(4, np.int8)})
    half.barrier()
    counts = {
        key: (count.calls, count.messages, count.logical_bytes)
        for key, count in comm.ledger.snapshot().items()
        if count.calls
    }
    assert counts == {
        ("world", "allreduce"): (1, 1, 20),
        ("world", "iallgather"): (1, 1, 16 * comm.size),
        ("data", "broadcast"): (1, 2, 28),
        ("data", "barrier"): (1, 1, 0),
    }
    comm.ledger.reset()
    assert comm.ledger.snapshot() == {}


REFUSED: list[tuple[str, Callable[[Communicator], Any], list[str]]] = [
    ("object", lambda c: c.allreduce(np.array([None])), ["allreduce", "object", "_object methods"]),
    ("string", lambda c: c.broadcast(np.array(["a"])), ["broadcast", "<U1", "_object methods"]),
    ("date", lambda c: c.allgather(np.array(["2020"], "M8[D]")), ["datetime64", "view('int64')"]),
    ("struct", lambda c: c.allreduce(np.zeros(1, "i4,f4")), ["each field"]),
    ("longdouble", lambda c: c.allreduce(np.zeros(1, np.longdouble)), ["cast to float64"]),
    ("byte order", lambda c: c.allreduce(np.zeros(1, ">f8")), ["foreign byte order", "newbyteorder"]),
    ("float8", lambda c: c.allreduce(np.zeros(1, ml_dtypes.float8_e4m3fn)), ["float8_e4m3fn"]),
    ("huge int", lambda c: c.allreduce(2**70), ["object"]),
    ("masked", lambda c: c.allreduce(np.ma.masked_array([1], [True])), ["masked", "filled"]),
    ("not an array", lambda c: c.allreduce({"a": {1}}), ["not an array", "got set"]),
    ("mean of int", lambda c: c.allreduce(np.zeros(1, int), "mean"), ["'mean'", "int64", "cast to float64"]),
    ("mean of bool", lambda c: c.reduce_scatter(np.zeros((c.size,), bool), "mean"), ["reduce_scatter", "bool"]),
    ("sum of bool", lambda c: c.reduce(np.zeros(1, bool)), ["'sum'", '"or"', '"and"', "cast"]),
    ("max of complex", lambda c: c.allreduce(np.zeros(1, complex), "max"), ["complex128", "no order"]),
    ("or of float", lambda c: c.allreduce(0.5, "or"), ["float64", "compare"]),
    ("unknown op", lambda c: c.allreduce(0.5, "avg"), ["'avg'", "'mean'"]),
    ("op array", lambda c: c.allreduce(0.5, np.array(["sum", "max"])), ["allreduce: unknown", "'max'", "'mean'"]),
    ("root", lambda c: c.broadcast(0.5, root=c.size), ["broadcast: no such root", "expected 0 to"]),
    ("negative root", lambda c: c.gather(0.5, root=-1), ["gather: no such root", "got -1"]),
    ("float root", lambda c: c.reduce(0.5, root=0.0), ["reduce: root is not an integer", "got 0.0"]),
    ("dest", lambda c: c.send(0.5, dest=c.size), ["send: no such dest"]),
    ("source", lambda c: c.recv(0.5, source=-2), ["recv: no such source"]),
    ("tag", lambda c: c.send(0.5, dest=0, tag=2**20), ["tag", "0 to 32766"]),
    ("counts short", lambda c: c.allgather(np.zeros(1), counts=[1] * (c.size + 1)), ["allgather", "per rank"]),
    ("counts negative", lambda c: c.allgather(np.zeros(1), counts=[-1] * c.size), ["unusable counts", "-1"]),
    ("counts differ", lambda c: c.allgather(np.zeros((2, 3)), counts=[1] * c.size), ["(2, 3)", "counts["]),
    ("0-d counts", lambda c: c.allgather(0.5, counts=[1] * c.size), ["shape ()"]),
    ("rows", lambda c: c.reduce_scatter(np.zeros((c.size + 1, 2))), ["number of rows", "one row per rank"]),
    ("rows counts", lambda c: c.reduce_scatter(np.zeros(9), counts=[1] * c.size), ["sum of counts"]),
    ("alltoall rows", lambda c: c.alltoall(np.zeros(c.size + 1)), ["alltoall", "one row per rank"]),
    ("scatter rows", lambda c: c.scatter(np.zeros(c.size + 1) if c.rank == 0 else None), ["one row per rank"]),
    ("alltoall", lambda c: c.alltoall(np.zeros(c.size), recv_counts=[1] * c.size), ["alltoall", "got recv_counts=[1"]),
    ("counts number", lambda c: c.allgather(np.zeros(3), counts=3), ["allgather: counts are not", "got 3", "per rank"]),
    ("ialltoall", lambda c: c.ialltoall(np.zeros(c.size), [1] * c.size), ["recv_counts"]),
    ("out shape", lambda c: c.allreduce(np.zeros(3), out=np.zeros(4)), ["out has the wrong shape", "(4,)", "(3,)"]),
    ("out dtype", lambda c: c.allreduce(np.zeros(3), out=np.zeros(3, "f4")), ["out", "float32", "float64"]),
    ("out type", lambda c: c.allreduce(np.zeros(3), out=memoryview(bytearray(24))), ["out", "memoryview"]),
    ("out tree", lambda c: c.allreduce([np.zeros(3)], out=np.zeros(3)), ["out has another structure"]),
    ("keys", lambda c: c.allreduce({(1, "a"): 1.0, ("a", 1): 1.0}), ["allreduce: the keys", "('a', 1)", "sorted"]),
    ("many bytes", lambda c: c.empty((2**40, 2**40)), ["empty", "(1099511627776, 1099511627776)", "2^63 bytes"]),
    ("2^63 bytes", lambda c: c.shared(2**60, "f8"), ["shared", "1152921504606846976", "8 bytes", "2^63 bytes"]),
    ("out read-only", lambda c: c.allreduce(np.zeros(3), out=np.broadcast_to(0.0, 3)), ["out is read-only"]),
    ("color", lambda c: c.split(-1), ["split", "-1", "None to stay out"]),
    ("large color", lambda c: c.split(2**31), ["split", "got 2147483648", "0 to 2147483647"]),
    ("key", lambda c: c.split(0, key="first"), ["split: key is not an integer", "'first'"]),
    ("large key", lambda c: c.split(0, key=-(2**31)), ["split: key out of range", "got -2147483648"]),
]


def refuses(comm: Communicator, call: Callable[[Communicator], Any], words: list[str]) -> None:
    """Every rank gets the same InputError, of one line, before anything is sent; the communicator stays usable."""
    with pytest.raises(_errors.InputError) as caught:
        call(comm)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    same(comm.allreduce(1), comm.size)
