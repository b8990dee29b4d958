"""Memory of results: used again once nobody refers to it, never before, and not held without end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from mpitrain.comm import Communicator, LocalWorld, results

MIB = 1 << 20
FLOAT = np.dtype(np.float32)


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    results._kept.clear()
    yield
    results._kept.clear()


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_a_dropped_result_gives_its_memory_to_the_next_of_its_size() -> None:
    first = results.empty((2, MIB), FLOAT)
    place = address(first)
    first[...] = 1
    del first
    again = results.empty((MIB, 1, 2), FLOAT)
    assert address(again) == place
    assert (again.shape, again.dtype) == ((MIB, 1, 2), FLOAT)
    assert again.flags.c_contiguous
    assert again.flags.writeable
    assert np.all(again == 1)
    assert not np.may_share_memory(again, results.empty((2 * MIB,), FLOAT))


def test_memory_that_a_view_refers_to_is_nobody_elses() -> None:
    first = results.empty((2 * MIB,), FLOAT)
    part = first[5:8].view(np.int32)
    part[...] = 7
    del first
    other = results.empty((2 * MIB,), FLOAT)
    other[...] = 0
    assert part.tolist() == [7, 7, 7]


def test_one_block_is_kept_that_of_the_last() -> None:
    small, large = results.empty((MIB,), FLOAT), results.empty((2 * MIB,), FLOAT)
    del large, small
    assert [block.nbytes for block in results._kept] == [4 * MIB]
    other = results.empty((3 * MIB,), FLOAT)  # of another size: what was kept is given back
    assert results._kept == []
    del other
    assert [block.nbytes for block in results._kept] == [12 * MIB]


@pytest.mark.parametrize("nbytes", [0, 4, results.SMALLEST_BYTES - 4, results.LARGEST_BYTES + 4])
def test_small_and_huge_results_are_not_kept(nbytes: int) -> None:
    made = results.empty((nbytes // 4,), FLOAT)
    assert (made.nbytes, made.dtype) == (nbytes, FLOAT)
    del made
    assert results._kept == []


def test_threads_never_share_memory() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(40):
            mine = results.empty((MIB,), FLOAT)
            mine[::1024] = number
            if not np.all(mine[::1024] == number):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_results_of_collectives_come_from_it() -> None:
    def ranks(comm: Communicator) -> list[bool]:
        x = np.full(MIB, comm.rank + 1, FLOAT)
        kept = comm.allreduce(x)
        taken = comm.allreduce(2 * x)
        return [bool(np.all(kept == 3)), bool(np.all(taken == 6)), isinstance(kept.base.base, results._Loan)]

    assert LocalWorld(2).run(ranks) == [[True] * 3] * 2
