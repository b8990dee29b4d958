"""What `LocalWorld` shows that a real MPI hides: who called what, who waits for whom, who failed first."""

from __future__ import annotations

import time

import numpy as np
import pytest

from mpitrain._errors import AbortError, CommunicationError, InputError, MismatchError
from mpitrain.comm import Communicator, LocalWorld


def test_returns_in_rank_order_and_hands_on_arguments() -> None:
    assert LocalWorld(3).run(lambda comm, a, b: (comm.rank, comm.size, a + b), 1, 2) == [(r, 3, 3) for r in range(3)]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((0,), "size is too small; got 0; expected at least 1"),
        ((2.0,), "size is not an integer; got 2.0"),
        (("2",), "size is not an integer; got '2'"),
        ((2, 0), "ranks_per_node is too small; got 0; expected at least 1"),
        ((2, -1), "ranks_per_node is too small; got -1"),
        ((2, 1.0), "ranks_per_node is not an integer"),
    ],
)
def test_refuses_what_is_no_number_of_ranks(sizes: tuple, words: str) -> None:
    with pytest.raises(InputError, match=f"LocalWorld: {words}"):
        LocalWorld(sizes[0], ranks_per_node=sizes[1] if len(sizes) > 1 else None)


def test_nodes() -> None:
    def where(comm: Communicator) -> tuple[int, int, int | None]:
        return comm.node.rank, comm.node.size, comm.leaders and comm.leaders.rank

    expected = [(0, 2, 0), (1, 2, None), (0, 2, 1), (1, 2, None), (0, 1, 2)]
    assert LocalWorld(5, ranks_per_node=2).run(where) == expected


@pytest.mark.parametrize("wait", ["allreduce", "recv", "split", "wait"])
def test_a_failure_wakes_all_and_is_raised_with_its_rank(wait: str) -> None:
    seen: list[str] = []

    def program(comm: Communicator) -> None:
        if comm.rank == 1:
            time.sleep(0.05)
            raise ZeroDivisionError("of rank 1")
        try:
            if wait == "recv":
                comm.recv(np.zeros(1), 1)
            elif wait == "split":
                comm.split(0)
            elif wait == "wait":
                comm.iallreduce(np.zeros(1)).wait()
            else:
                comm.allreduce(np.zeros(1))
        except AbortError as error:
            seen.append(str(error))
            raise

    start = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="of rank 1") as caught:
        LocalWorld(3).run(program)
    assert time.monotonic() - start < 5
    assert caught.value.__notes__ == ["raised on rank 1 of 3"]
    assert seen == ["aborted, because rank 1 failed: ZeroDivisionError: of rank 1"] * 2


def test_abort_ends_the_world() -> None:
    with pytest.raises(AbortError, match="rank 0 of 2 aborted with code 7"):
        LocalWorld(2).run(lambda comm: comm.abort(7) if comm.rank == 0 else comm.barrier())


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ((lambda c: c.allreduce(np.zeros(3)), lambda c: c.barrier()), ["rank 0: allreduce(float64[3]", "barrier()"]),
        ((lambda c: c.allreduce(np.zeros(3)), lambda c: c.allreduce(np.zeros(4))), ["float64[3]", "float64[4]"]),
        ((lambda c: c.allreduce(np.zeros(3)), lambda c: c.allreduce(np.zeros(3, "f4"))), ["float64[3]", "float32[3]"]),
        ((lambda c: c.allreduce(1.0, "max"), lambda c: c.allreduce(1.0, "min")), ["op=max", "op=min"]),
        ((lambda c: c.broadcast(1.0, 0), lambda c: c.broadcast(1.0, 1)), ["root=0", "rank 1: broadcast", "root=1"]),
        ((lambda c: c.allreduce(1.0), lambda c: c.iallreduce(1.0).wait()), ["rank 0: allreduce", "rank 1: iallreduce"]),
        (
            (lambda c: c.allreduce(np.zeros(2, "f2")), lambda c: c.allreduce(np.zeros(2, "f4"))),
            ["float16[2]", "float32[2]"],
        ),
    ],
)
def test_mismatched_collectives_name_what_each_rank_called(calls: tuple, words: list[str]) -> None:
    with pytest.raises(MismatchError) as caught:
        LocalWorld(2).run(lambda comm: calls[comm.rank](comm))
    assert all(word in str(caught.value) for word in [*words, "test_comm_local.py:"]), str(caught.value)


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize(
    ("recv_counts", "words"),
    [
        (([1, 3], [1, 3]), "rank 0 gives 6 elements to rank 0, which takes 3"),
        (([2, 2], [3, 1]), "rank 0 gives 6 elements to rank 1, which takes 9"),
        (([2, 9], [2, 2]), "rank 1 gives 6 elements to rank 0, which takes 27"),
    ],
)
def test_both_sides_of_an_alltoall(recv_counts: tuple, words: str, begins: bool) -> None:
    def program(comm: Communicator) -> None:
        for takes in ([2, 2], recv_counts[comm.rank]):
            if begins:
                comm.ialltoall(np.ones((4, 3)), [2, 2], takes).wait()
            else:
                comm.alltoall(np.ones((4, 3)), [2, 2], takes)

    with pytest.raises(MismatchError, match=f"alltoall: {words}\n  rank 0: i?alltoall.* at .*test_comm_local.py"):
        LocalWorld(2).run(program)


def test_a_message_of_another_shape_or_dtype() -> None:
    for like in (np.zeros(4), np.zeros(3, "f4")):
        with pytest.raises(MismatchError, match=r"sent: send\(float64\[3\]\); expected: recv"):
            LocalWorld(2).run(lambda comm, x=like: comm.send(np.zeros(3), 1) if comm.rank == 0 else comm.recv(x, 0))


def test_waiting_for_a_rank_that_has_returned() -> None:
    with pytest.raises(MismatchError, match=r"barrier.*on rank 0 waits for rank 1, which has returned"):
        LocalWorld(2).run(lambda comm: comm.barrier() if comm.rank == 0 else None)
    with pytest.raises(MismatchError, match=r"recv.*waits for rank 1, which has returned"):
        LocalWorld(2).run(lambda comm: comm.recv(1.0, 1) if comm.rank == 0 else None)


def exchange_by_blocking_sends(comm: Communicator) -> None:
    other = 1 - comm.rank
    comm.send(np.zeros(1), other)
    comm.recv(np.zeros(1), other)


def test_rendezvous_shows_a_deadlock_that_buffering_hides() -> None:
    LocalWorld(2).run(exchange_by_blocking_sends)
    with pytest.raises(CommunicationError, match=r"send.*has waited for 0.2 s\n  rank 0: send.*\n  rank 1: send"):
        LocalWorld(2, rendezvous=True, timeout_s=0.2).run(exchange_by_blocking_sends)


def test_sends_copy() -> None:
    def program(comm: Communicator) -> float | None:
        if comm.rank == 0:
            x = np.ones(2)
            comm.send(x, 1)
            x[:] = 5
            comm.barrier()
            return None
        comm.barrier()
        return float(comm.recv(np.zeros(2), 0).sum())

    assert LocalWorld(2).run(program)[1] == 2.0
