"""Calls that are longer than MPI's counts: with the limit at a few elements, and once with more than 2³¹ bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import algorithm_suite
import numpy as np
import pytest
from conformance import CHECKS, DTYPES, folded, own_rows, same, values

import mpitrain.comm.mpi
from mpitrain._errors import MismatchError
from mpitrain.comm import Communicator, pieces
from mpitrain.comm.calls import Call

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.filterwarnings("ignore:.* was dropped without wait:ResourceWarning"),
]
LONG = 2**31 + 5
MARKS = [0, 2**30 - 1, 2**30, 2**31 - 1, 2**31, LONG - 1]
NEEDED_GIB = 12


@pytest.fixture(params=[1, 7, 20])
def short(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, world: Communicator) -> Iterator[None]:
    """Let no call of the library's move more than a few elements, and see to it."""
    message = mpitrain.comm.mpi._message

    def checked(call: Call, rank: int) -> tuple[str, tuple[Any, ...]]:
        name, arguments = message(call, rank)
        if call.peer is None:
            assert max((side.size for side in (call.send, call.recv) if side is not None), default=0) <= request.param
        elif arguments[0][0].size > request.param:
            assert arguments[0][1] == 1
        return name, arguments

    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", request.param)
    monkeypatch.setattr(mpitrain.comm.mpi, "_message", checked)
    world._shorten()
    yield
    monkeypatch.undo()
    world._shorten()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("short", [7], indirect=True)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conforms_in_pieces(world: Communicator, check: Callable[[Communicator], None]) -> None:
    check(world)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("short", [7], indirect=True)
@pytest.mark.parametrize(("operation", "name"), algorithm_suite.PAIRS)
def test_algorithms_send_long_messages(world: Communicator, operation: str, name: str) -> None:
    algorithm_suite.check_values(world, operation, name)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("dtype", [*DTYPES, "bool"], ids=str)
def test_every_collective_of_uneven_shares(world: Communicator, dtype: Any) -> None:
    """Shares of 0, 3, 6 … rows, so that some are longer than the limit and some are not; blocking and not."""
    size, rank = world.size, world.rank
    counts = [3 * r for r in range(size)]
    whole = [values(r, (sum(counts), 2), dtype) for r in range(size)]
    own = own_rows(counts, rank)
    root = size - 1
    same(world.allgather(whole[0][own], counts), whole[0])
    same(world.iallgather(whole[0][own], counts).wait(), whole[0])
    got = world.gather(whole[0][own], root, counts)
    assert got is None if rank != root else np.array_equal(got, whole[0])
    same(world.scatter(whole[root] if rank == root else None, root, counts), whole[root][own])
    op = "max" if np.dtype(dtype).kind in "biuf" else "sum"
    total = folded(size, whole[0].shape, dtype, op)
    same(world.reduce_scatter(whole[rank], op, counts), total[own])
    same(world.ireduce_scatter(whole[rank], op, counts).wait(), total[own])
    same(world.iallreduce(whole[rank], op).wait(), total)
    got = world.ireduce(whole[rank], op, root).wait()
    assert got is None if rank != root else np.array_equal(got, total)
    same(world.ibroadcast(whole[rank], root).wait(), whole[root])


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("blocks", [True, False])
def test_alltoall_where_only_some_ranks_have_long_parts(world: Communicator, blocks: bool) -> None:
    """Rank s sends rank d s·d rows: rank 0 has nothing long and joins all the same."""
    counts = [world.rank * dest for dest in range(world.size)]
    x = np.repeat(np.arange(world.size) + 10 * world.rank, counts).astype(np.float32)
    expected = np.repeat(10 * np.arange(world.size) + world.rank, counts).astype(np.float32)
    exchange = world.alltoall if blocks else lambda *args: world.ialltoall(*args).wait()
    same(exchange(x, counts, counts), expected)
    square = np.arange(world.size * 9).reshape(world.size, 9) + 100 * world.rank
    rows = slice(9 * world.rank, 9 * world.rank + 9)
    same(
        (world.alltoall if blocks else lambda y: world.ialltoall(y).wait())(square),
        np.stack([np.arange(world.size * 9)[rows] + 100 * source for source in range(world.size)]),
    )


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("sent", "wanted"), list(product((3, 30, 31, 45), repeat=2)))
def test_long_messages_of_another_size_are_errors(world: Communicator, sent: int, wanted: int) -> None:
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    request = world.isend(np.arange(sent), right)
    if sent == wanted:
        same(world.recv(np.zeros(wanted, np.int64), left), np.arange(sent))
    else:
        with pytest.raises(MismatchError, match="recv"):
            world.recv(np.zeros(wanted, np.int64), left)
    request.wait()
    same(world.sendrecv(np.arange(40) * world.rank, right, left), np.arange(40) * left)  # nothing is left behind


@pytest.mark.usefixtures("short")
def test_requests_in_pieces_put_their_result_in_place_once(world: Communicator) -> None:
    counts = [2, *[40] * (world.size - 1)]
    counts = [counts[(world.rank + dest) % world.size] for dest in range(world.size)]
    out = np.zeros(sum(counts))
    request = world.ialltoall(np.ones(sum(counts)), counts, counts, out=out)
    while not request.test():
        pass
    request.wait()
    same(out, np.ones(sum(counts)))
    out[...] = 7
    for handle in request._handles:
        handle.wait()
    same(out, np.full(sum(counts), 7.0))


@pytest.fixture
def roomy(world: Communicator) -> Iterator[Communicator]:
    """All ranks, without shared memory, on a machine that has room for arrays of 2 GiB."""
    if world.size != 2:
        pytest.skip("needs two ranks")
    with open("/proc/meminfo") as file:
        free_kib = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    free_gib = int(world.allreduce(free_kib, "min")) >> 20
    if free_gib < NEEDED_GIB:
        pytest.skip(f"needs {NEEDED_GIB} GiB of free memory, this machine has {free_gib}")
    with world.split(0) as comm:
        yield comm


def _marked(value: int) -> np.ndarray:
    x = np.full(LONG, value, np.uint8)
    x[MARKS] = np.arange(10, 10 + len(MARKS)) * value
    return x


def _is_marked(x: np.ndarray, value: int) -> bool:
    found, at = x[MARKS] == np.arange(10, 10 + len(MARKS)) * value, x[MARKS].copy()
    x[MARKS] = value
    blocks = (x[start : start + 2**26] for start in range(0, LONG, 2**26))
    rest = all((block == value).all() for block in blocks)
    x[MARKS] = at
    return bool(found.all()) and rest


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("transport", ["host", "shared"])
def test_more_than_two_to_the_31_elements(roomy: Communicator, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPITRAIN_TRANSPORT", transport)
    x = _marked(roomy.rank + 1)
    assert roomy.allreduce(x, out=x) is x
    assert roomy.transport == transport
    assert _is_marked(x, 3)
    if transport == "shared":  # it only reduces
        return
    x = _marked(roomy.rank + 1)
    roomy.broadcast(x, 1, out=x)
    assert _is_marked(x, 2)
    x[...] = 0
    if roomy.rank == 0:
        roomy.send(_marked(5), 1)
    else:
        roomy.recv(x, 0, out=x)
        assert _is_marked(x, 5)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_message_of_more_than_two_gib_in_fewer_elements(roomy: Communicator) -> None:
    x = np.full(2**28 + 3, roomy.rank, np.float64)
    if roomy.rank == 0:
        roomy.send(x, 1)
    else:
        roomy.recv(x, 0, out=x)
        assert not x.any()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_object_of_more_than_two_gib(roomy: Communicator) -> None:
    obj = {"long": _marked(3)} if roomy.rank == 1 else None
    got = roomy.broadcast_object(obj, root=1)
    assert _is_marked(got["long"], 3)
    del got
    if roomy.rank == 1:
        roomy.send_object(obj, 0)
    else:
        assert _is_marked(roomy.recv_object(1)["long"], 3)
