"""Collectives on arrays of any library: one suite over libraries and dtypes, between threads and under ``mpiexec``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from array_kinds import KINDS, Kind, address, numpy_dtype
from conformance import folded, ops, own_rows, shards, values

from mpitrain._errors import InputError
from mpitrain.comm import Communicator, LocalWorld, prepare

SHAPES: list[tuple[int, ...]] = [(), (5,), (2, 3), (0,)]
CHECKS: list[Callable[[Communicator, Kind], None]] = []


def check(function: Callable[[Communicator, Kind], None]) -> Callable[[Communicator, Kind], None]:
    CHECKS.append(function)
    return function


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return _installed(request.param)


def _installed(name: str) -> Kind:
    KINDS[name].result()  # skips where it is not
    return KINDS[name]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_between_threads(check: Callable[[Communicator, Kind], None], kind: Kind, size: int) -> None:
    LocalWorld(size, timeout_s=20).run(check, kind)


@pytest.mark.mpi
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_over_mpi(check: Callable[[Communicator, Kind], None], kind: Kind, world: Communicator) -> None:
    check(world, kind)


# The suite.


@check
def allreduce_every_dtype_op_and_shape(comm: Communicator, kind: Kind) -> None:
    for name, shape in product(kind.dtypes, SHAPES):
        dtype = numpy_dtype(name)
        for op in ("or", "and") if name == "bool" else ops(dtype):
            own = _own(comm.rank, shape, dtype)
            x = kind.make(own)
            kind.same(comm.allreduce(x, op), _folded(comm.size, shape, dtype, op))
            kind.holds(x, own)


@check
def the_other_collectives(comm: Communicator, kind: Kind) -> None:
    counts, last = shards(comm.size), comm.size - 1
    for name in sorted({"float32", "bfloat16", "bool", "int64"} & set(kind.dtypes)):
        dtype = numpy_dtype(name)
        everyones = [_own(r, (comm.size, 3), dtype) for r in range(comm.size)]
        x, whole = kind.make(everyones[comm.rank]), _own(0, (7, 2), dtype)
        kind.same(comm.broadcast(x, last), everyones[last])
        kind.same(comm.allgather(x), np.stack(everyones))
        kind.same(comm.allgather(kind.make(whole[own_rows(counts, comm.rank)]), counts), whole)
        kind.same(comm.alltoall(x), np.stack([each[comm.rank] for each in everyones]))
        kind.same(comm.iallgather(x).wait(), np.stack(everyones))
        kind.same(comm.scatter(x, last), everyones[last][comm.rank])  # whose library each rank's own x tells
        kind.same(comm.sendrecv(x, (comm.rank + 1) % comm.size, comm.rank - 1 if comm.rank else last),
                  everyones[comm.rank - 1])  # fmt: skip
        op = "or" if name == "bool" else "max"
        total = _folded(comm.size, (comm.size, 3), dtype, op)
        kind.same(comm.reduce_scatter(x, op), total[comm.rank])
        for got in (comm.reduce(x, op, last), comm.ireduce(x, op, last).wait()):
            kind.same(got, total) if comm.rank == last else _none(got)
        gathered = comm.gather(x, last)
        kind.same(gathered, np.stack(everyones)) if comm.rank == last else _none(gathered)


@check
def out_of_every_collective(comm: Communicator, kind: Kind) -> None:
    for name in [name for name in ("float32", "float16", "bfloat16") if name in kind.dtypes]:
        dtype = numpy_dtype(name)
        own = _own(comm.rank, (comm.size, 3), dtype)
        calls: list[Callable[[Any, Any], Any]] = [
            lambda x, out: comm.allreduce(x, out=out),
            lambda x, out: comm.broadcast(x, out=out),
            lambda x, out: comm.allgather(x, out=out),
            lambda x, out: comm.reduce_scatter(x, out=out),
            lambda x, out: comm.alltoall(x, out=out),
            lambda x, out: comm.scatter(x if comm.rank == 0 else None, out=out),
            lambda x, out: comm.iallreduce(x, out=out).wait(),
        ]
        for call in calls:
            expected = call(own, None)
            out = kind.make(np.full(expected.shape, 7, dtype))
            if not kind.mutable:
                with pytest.raises(InputError, match="out is a JAX array, and these are immutable; leave out= away"):
                    call(kind.make(own), out)
                return
            assert call(kind.make(own), out) is out
            kind.holds(out, expected)


@check
def in_place(comm: Communicator, kind: Kind) -> None:
    if not kind.mutable:
        return
    for name, shape in product(kind.dtypes, SHAPES):
        dtype, op = numpy_dtype(name), "or" if name == "bool" else "sum"
        x = kind.make(_own(comm.rank, shape, dtype))
        before = address(x)
        assert comm.allreduce(x, op, out=x) is x
        assert address(x) == before
        kind.holds(x, _folded(comm.size, shape, dtype, op))


@check
def trees(comm: Communicator, kind: Kind) -> None:
    tree = {"b": kind.make(_own(comm.rank, (2, 3), "float32")), "a": [kind.make(_own(comm.rank, (4,), "int32")), None]}
    got = comm.allreduce(tree)
    kind.same(got["b"], folded(comm.size, (2, 3), "float32", "sum"))
    kind.same(got["a"][0], folded(comm.size, (4,), "int32", "sum"))
    assert got["a"][1] is None


@check
def reproducible_sums(comm: Communicator, kind: Kind) -> None:
    own = np.random.default_rng(comm.rank).normal(size=(comm.size, 4)).astype("float32")
    kind.same(comm.allreduce(kind.make(own), reproducible=True), comm.allreduce(own, reproducible=True))
    kind.same(comm.reduce_scatter(kind.make(own), reproducible=True), comm.reduce_scatter(own, reproducible=True))
    rows = np.arange(comm.size, dtype="int32")
    kind.same(comm.reduce_scatter(kind.make(rows), reproducible=True), np.int32(comm.rank * comm.size))


@check
def another_library_for_out_is_refused(comm: Communicator, kind: Kind) -> None:
    other: Any = np.zeros(3, "float32") if kind.name != "numpy" else memoryview(np.zeros(3, "float32"))
    with pytest.raises(InputError, match="allreduce: out is of another library than the input"):
        comm.allreduce(kind.make(np.zeros(3, "float32")), out=other)


@check
def ranks_may_use_different_libraries(comm: Communicator, kind: Kind) -> None:
    own = _own(comm.rank, (2, 2), "float32")
    mine = kind if comm.rank else KINDS["numpy"]
    comm.debug = True  # which compares what the ranks hand in
    mine.same(comm.allreduce(mine.make(own)), folded(comm.size, (2, 2), "float32", "sum"))
    mine.same(comm.allreduce([mine.make(own[0])])[0], folded(comm.size, (2, 2), "float32", "sum")[0])
    comm.debug = False


# Zero copies.

HELD = [(kind.name, name) for kind in KINDS.values() for name in ("float32", "bfloat16", "bool") if name in kind.dtypes]


@pytest.mark.parametrize(("library", "name"), HELD)
def test_contiguous_arrays_are_sent_from_their_own_memory(library: str, name: str) -> None:
    kind = _installed(library)
    x = kind.make(_own(0, (1, 3), numpy_dtype(name)))
    for prepared in (
        prepare.gathering("allgather", 0, 1, x, None, None, None),
        prepare.alltoall("alltoall", 1, x, None, None, None),
        prepare.send("send", x, 0, 0),
    ):
        sent = prepared.calls[0].send
        assert sent is not None
        assert address(sent) == address(x)


@pytest.mark.parametrize(("library", "name"), [each for each in HELD if KINDS[each[0]].mutable])
def test_results_are_received_into_the_memory_of_out(library: str, name: str) -> None:
    kind = _installed(library)
    dtype = numpy_dtype(name)
    x, out = kind.make(_own(0, (1, 3), dtype)), kind.make(_own(0, (1, 3), dtype))
    prepared = [prepare.broadcast("broadcast", x, 0, x, True), prepare.alltoall("alltoall", 1, x, None, None, out)]
    if name == "float32":  # 16-bit floats are reduced in float32
        prepared.append(prepare.reduction("allreduce", 1, x, "sum", x, None, True))
    places = [address(each.calls[0].recv) for each in prepared]
    assert places == [address(x), address(out), address(x)][: len(places)]


def test_results_do_not_share_memory_with_the_input(kind: Kind) -> None:
    def run(comm: Communicator) -> None:
        x = kind.make(np.ones((1, 3), "float32"))
        for got in (comm.allreduce(x), comm.broadcast(x), comm.alltoall(x)):
            assert address(got) != address(x)

    LocalWorld(1).run(run)


# What must not be written to.


def _bytes_view() -> Any:
    return np.frombuffer(bytes(12), "float32")


OVERLAPPING = np.lib.stride_tricks.as_strided(np.zeros(8, "float32"), (3, 3), (4, 4), writeable=True)
READ_ONLY: dict[str, tuple[Any, str]] = {
    "array": (_bytes_view(), "out is read-only"),
    "bytes": (bytes(3), "out is read-only"),
    "memoryview": (memoryview(bytes(3)), "out is read-only"),
    "dlpack": (KINDS["dlpack"].make(np.zeros(3)), "out is read-only"),
    "windows": (OVERLAPPING, "elements of out share memory"),
    "broadcast": (np.broadcast_to(np.zeros(1), (3,)), "out is read-only"),
}
READ_ONLY["dlpack"][0].values.flags.writeable = False


@pytest.mark.parametrize("case", READ_ONLY)
def test_read_only_memory_is_refused(case: str) -> None:
    out, message = READ_ONLY[case]

    def run(comm: Communicator) -> None:
        with pytest.raises(InputError, match=f"allreduce: {message}"):
            comm.allreduce(out, "max", out=out)
        comm.allreduce(out, "max")  # by value it will do

    LocalWorld(2).run(run)


def test_strides_that_do_not_overlap_are_allowed() -> None:
    def run(comm: Communicator) -> None:
        for out in (np.ones((4, 6))[::-2, ::3], np.ones((2, 3, 4)).transpose(2, 0, 1), np.ones((3, 1, 2))[:, :, ::2]):
            comm.allreduce(out, out=out)
            assert np.array_equal(out, np.full(out.shape, 2.0))

    LocalWorld(2).run(run)


# What is no array.


def test_what_cannot_be_read_is_one_clear_line() -> None:
    released = memoryview(b"abc")
    released.release()

    class Elsewhere(type(KINDS["dlpack"].make(np.zeros(1)))):  # type: ignore[misc]
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("it is somewhere else")

    def run(comm: Communicator) -> None:
        for x, words in (
            ("text", "not an array; got str"),
            (released, "not an array; got memoryview"),
            ({"a": object()}, "not an array; got object"),
            (Elsewhere(np.zeros(1)), r"array cannot be read through DLPack; got Elsewhere \(it is somewhere else\)"),
            (None, "not an array; got NoneType"),
        ):
            with pytest.raises(InputError, match=f"allgather: {words}"):
                comm.allgather(x)

    LocalWorld(1).run(run)


def test_bytes_and_arrays_of_the_standard_library() -> None:
    from array import array

    def run(comm: Communicator) -> None:
        assert comm.allgather(b"ab").tolist() == [[97, 98]] * comm.size
        x = array("d", [1.0, 2.0])
        assert comm.allreduce(x, out=x) is x
        assert x.tolist() == [comm.size, 2.0 * comm.size]
        buffer = bytearray(b"\0\1")
        comm.allreduce(buffer, out=buffer)
        assert buffer == bytes([0, comm.size])

    LocalWorld(2).run(run)


@pytest.mark.parametrize("library", [name for name in KINDS if name != "numpy"])
def test_lanes_are_of_numpy_or_cupy(library: str) -> None:
    from mpitrain.comm import lane_sum

    kind = _installed(library)

    def run(comm: Communicator) -> None:
        with pytest.raises(InputError, match="lane_sum: lanes are NumPy or CuPy arrays; got"):
            lane_sum(comm, [kind.make(np.zeros(3, "float32"))], 1)

    LocalWorld(1).run(run)


def test_a_library_that_cannot_make_the_result_gets_numpy_arrays() -> None:
    member = KINDS["array API"].make(np.ones(3))
    member.__class__ = type("Poor", (type(member),), {"__array_namespace__": lambda self: object()})

    def run(comm: Communicator) -> None:
        assert type(comm.allreduce(member)) is np.ndarray

    LocalWorld(1).run(run)


def test_unknown_formats_are_refused() -> None:
    from ctypes import c_longdouble

    def run(comm: Communicator) -> None:
        with pytest.raises(InputError, match="allgather: buffer of an unknown format; got c_longdouble_Array_2"):
            comm.allgather((c_longdouble * 2)())

    LocalWorld(1).run(run)


def _own(rank: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """What a rank puts in; of bools not all true."""
    found = values(rank, shape, "int8")
    return found == 1 if np.dtype(dtype) == bool else found.astype(dtype)


def _folded(size: int, shape: tuple[int, ...], dtype: Any, op: str) -> np.ndarray:
    if np.dtype(dtype) != bool:
        return folded(size, shape, dtype, op)
    stack = np.stack([_own(rank, shape, bool) for rank in range(size)])
    return stack.any(0) if op in ("or", "max") else stack.all(0)


def _none(got: Any) -> None:
    assert got is None
