"""The shared-memory transport on threads: many ranks and nodes without MPI; its parts by themselves; its failures."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import shared_checks
from conformance import CHECKS, folded, same, values
from hypothesis import given
from hypothesis import strategies as st

from mpitrain._errors import InputError, MismatchError, StorageError
from mpitrain._typing import Array
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.comm.calls import Call
from mpitrain.comm.local import LocalCommunicator
from mpitrain.comm.transports import blocks
from mpitrain.comm.transports.blocks import Arena, Place
from mpitrain.comm.transports.choice import choose
from mpitrain.comm.transports.fence import LINE_BYTES, Fence
from mpitrain.comm.transports.host import HostTransport
from mpitrain.comm.transports.shards import bounds, pieces, pieces_of_chunks

Check = Callable[[Communicator], None]

pytestmark = pytest.mark.filterwarnings("ignore:.* was dropped without wait:ResourceWarning")


@pytest.fixture(params=["compiled", "numpy"])
def over_shared_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let threads reduce everything over shared memory, in chunks of a few elements."""
    shared_checks.use_loops(request.param, monkeypatch)
    shared_checks.cut_small(monkeypatch, streamed_from_bytes=1)
    plain = LocalCommunicator._run

    def run(self: LocalCommunicator, call: Call) -> None:
        eligible = call.operation == "allreduce" and self.ledger.axis == "world"
        if not (eligible and call.recv is not None and self._moves().allreduce(call.recv, call.recv, call.op or "sum")):
            plain(self, call)

    monkeypatch.setattr(LocalCommunicator, "_run", run)
    monkeypatch.setattr(LocalCommunicator, "_choose_transport", lambda self: choose(self, lambda: lambda: None))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # waiting threads hand over quickly
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("check", shared_checks.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("size", [1, 3])
def test_ordinary_threads_pass_the_same_checks(check: Check, size: int) -> None:
    LocalWorld(size, timeout_s=20).run(check)


@pytest.mark.usefixtures("over_shared_memory")
@pytest.mark.parametrize("check", [*shared_checks.CHECKS, *CHECKS], ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    ("over_shared_memory", "size", "ranks_per_node"),
    [
        *(("compiled", 2, 2), ("compiled", 3, 3), ("numpy", 2, 2)),
        *(  # of several nodes compiled loops serve none; processes try those always
            pytest.param("numpy", size, per_node, marks=pytest.mark.slow) for size, per_node in ((3, 3), (4, 2), (3, 1))
        ),
    ],
    indirect=["over_shared_memory"],
)
def test_threads_over_shared_memory_and_a_network(check: Check, size: int, ranks_per_node: int) -> None:
    def body(comm: Communicator) -> None:
        assert comm.transport == (
            "network" if ranks_per_node == 1 else "shared"
        )  # chosen now: the ledger counts that too
        check(comm)

    LocalWorld(size, ranks_per_node=ranks_per_node, timeout_s=60).run(body)


@pytest.mark.usefixtures("over_shared_memory")
@pytest.mark.parametrize(("size", "ranks_per_node"), [(12, 12), (16, 4)])
def test_wide_nodes(size: int, ranks_per_node: int) -> None:
    def body(comm: Communicator) -> None:
        assert comm.transport == "shared"
        x = comm.empty((50, 21))
        for _ in range(2):
            for y in (x, np.empty((50, 21), np.float32)):
                y[...] = values(comm.rank, y.shape)
                same(comm.allreduce_plan(y)(), folded(size, y.shape, "float32", "sum"))
                comm.allreduce(y, out=y)
                same(y, folded(size, y.shape, "float32", "sum"))

    LocalWorld(size, ranks_per_node=ranks_per_node).run(body)


@pytest.mark.usefixtures("over_shared_memory")
def test_values_are_combined_in_rank_order() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 999)).astype(np.float32)
    expected = (rows[0] + rows[1]) + rows[2]

    def body(comm: Communicator) -> None:
        x = comm.empty(999)
        x[...] = rows[comm.rank]
        same(comm.allreduce(x), expected)
        same(comm.allreduce_plan(x)(), expected)
        same(comm.allreduce(x, out=x), expected)

    LocalWorld(3).run(body)


@pytest.mark.usefixtures("over_shared_memory")
@pytest.mark.parametrize(("size", "ranks_per_node", "wish"), [(3, 2, None), (1, 1, None), (2, 2, "host")])
def test_the_host_transport_is_chosen(
    size: int, ranks_per_node: int, wish: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wish:
        monkeypatch.setenv("MPITRAIN_TRANSPORT", wish)
    found = LocalWorld(size, ranks_per_node=ranks_per_node).run(lambda comm: comm.transport)
    assert found == ["host"] * size


@pytest.mark.usefixtures("over_shared_memory")
@pytest.mark.parametrize(
    ("wish", "ranks_per_node", "words"),
    [("rdma", 3, "got rdma; expected host or shared or network"), ("shared", 2, "nodes have 1 to 2 ranks")],
)
def test_a_wish_that_cannot_be_met_is_an_error(
    wish: str, ranks_per_node: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPITRAIN_TRANSPORT", wish)
    with pytest.raises(InputError, match=words):
        LocalWorld(3, ranks_per_node=ranks_per_node).run(lambda comm: comm.transport)


@pytest.mark.usefixtures("over_shared_memory")
def test_ranks_that_disagree_are_told() -> None:
    def body(comm: Communicator) -> None:
        x = comm.empty(100)
        with pytest.raises(MismatchError, match="rank 0 of the node: 100 elements; rank 1 of the node: 99"):
            comm.allreduce(x[comm.rank :], out=x[comm.rank :])
        with pytest.raises(MismatchError, match="another dtype or op"):
            comm.allreduce(x, ("sum", "max")[comm.rank], out=x)
        comm.allreduce(x, out=x)  # the transport is still in step

    LocalWorld(2).run(body)


@pytest.mark.usefixtures("over_shared_memory")
@pytest.mark.parametrize("debug", ["0", "1"])
def test_debug_mode_is_not_advised_while_it_is_on(monkeypatch: pytest.MonkeyPatch, debug: str) -> None:
    monkeypatch.setenv("MPITRAIN_DEBUG", debug)
    with pytest.raises(MismatchError, match="ranks reduce different arrays") as caught:
        LocalWorld(2).run(lambda comm: comm.allreduce_plan(comm.empty(1000 + comm.rank))())
    assert ("MPITRAIN_DEBUG=1 names" in str(caught.value)) == (debug == "0")


def test_memory_that_cannot_be_backed_is_an_error_on_all_ranks(
    over_shared_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    granted = os.posix_fallocate

    def refuse(descriptor: int, offset: int, length: int) -> None:
        if length > 1 << 20 and offset > 0:  # on the last rank only
            raise OSError(errno.ENOSPC, "full")
        granted(descriptor, offset, length)

    def body(comm: Communicator) -> None:
        assert comm.transport == "shared"
        with pytest.raises(StorageError, match=r"No space left.*2 ranks × 2,097,152 bytes.*--mem"):
            comm.empty(1 << 19)
        assert comm.allreduce(comm.empty(5) + 1)[0] == 2

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    LocalWorld(2).run(body)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_more_memory_than_there_is_is_an_error_before_the_kernel_ends_processes_for_it(
    over_shared_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files in memory have no limit of their own: what is asked for must not be backed to see whether it is there."""
    backed: list[int] = []
    plain = os.posix_fallocate

    def back(descriptor: int, offset: int, length: int) -> None:
        backed.append(length)
        assert length < 1 << 30
        plain(descriptor, offset, length)

    def body(comm: Communicator) -> None:
        with pytest.raises(
            StorageError, match=r"cannot be had; got Cannot allocate memory; expected 2 ranks × .*--mem"
        ):
            comm.empty(1 << 47)
        assert comm.allreduce(comm.empty(5) + 1)[0] == 2

    monkeypatch.setattr(os, "posix_fallocate", back)
    LocalWorld(2).run(body)
    assert backed


def test_a_file_size_limit_is_met_before_use() -> None:
    """A real refusal by the kernel, as a container's limit gives it."""
    code = (
        "import resource; from mpitrain.comm import LocalWorld; from mpitrain.comm.transports.blocks import Arena\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "LocalWorld(2).run(lambda comm: Arena(comm).allocate(1 << 20))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert (
        "StorageError: empty: the memory that the ranks of a node share cannot be had; got File too large"
        in done.stderr
    )


def test_another_process_with_the_same_number_is_not_taken_for_the_owner(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file, pytest.raises(OSError, match="another file"):
        blocks._open(os.getpid(), file.fileno(), 0, 0)


def _mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:mpitrain")


def test_memory_is_released_with_its_last_view(over_shared_memory: None) -> None:
    gc.collect()
    before = _mapped()

    def body(comm: Communicator) -> None:
        kept = [comm.empty(1000) for _ in range(5)]
        for x in kept:
            comm.allreduce(x, out=x)
        plan = comm.allreduce_plan(kept[0], in_place=True)
        plan()
        del x, plan
        view = kept[3][10:20]
        comm.barrier()
        held = _mapped()
        comm.barrier()
        assert held >= before + 2 * 5
        del kept
        comm.barrier()
        assert _mapped() == held - 2 * 4
        comm.barrier()
        assert not view.any()

    LocalWorld(2).run(body)
    gc.collect()
    assert _mapped() == before


@given(st.integers(0, 5000), st.integers(1, 128), st.sampled_from([1, 2, 4, 8, 16]))
def test_shards_cover_all_elements_once_and_begin_on_cache_lines(elements: int, ranks: int, item_bytes: int) -> None:
    cuts = bounds(elements, ranks, item_bytes)
    assert cuts[0] == 0
    assert cuts[-1] == elements
    assert cuts == sorted(cuts)
    assert all(cut * item_bytes % 64 == 0 for cut in cuts if cut != elements)
    lines = [-(-(end - begin) * item_bytes // 64) for begin, end in pairwise(cuts)]
    assert max(lines) - min(lines) <= 1


@given(st.integers(0, 5000), st.integers(1, 16))
def test_pieces_cover_a_range(elements: int, ranks: int) -> None:
    covered = [i for piece in pieces(3, elements, 100) for i in range(elements)[piece]]
    assert covered == list(range(3, elements))
    cut = [
        i
        for rank in range(ranks)
        for s in pieces_of_chunks(elements, rank, ranks, 4, 512, 3)
        for i in range(elements)[s]
    ]
    assert sorted(cut) == list(range(elements))


def _lines(ranks: int) -> Array:
    return np.zeros((ranks, LINE_BYTES), np.uint8)


def test_a_fence_orders_memory_before_it_tells_and_after_it_has_seen() -> None:
    lines, seen = _lines(2), []
    Fence(lines, 1, None, True)._own[0] = 1
    fence = Fence(lines, 0, lambda: seen.append(int(fence._own[0])), True)
    fence.wait()
    assert seen == [0, 1]


@pytest.mark.parametrize(("elements", "offset"), [((1 << 22) - 1, 0), (1 << 22, 64), ((3 << 21) + 5, 64)])
def test_large_arrays_of_the_librarys_do_not_begin_with_a_page(elements: int, offset: int) -> None:
    x = HostTransport().empty((1, elements), np.dtype(np.float64))
    assert (x.shape, x.ctypes.data % 4096) == ((1, elements), offset)
    x[0, :9] = x[0, -9:] = 1
    assert not x[0, 9:-9:4096].any()


def test_blocks_that_the_collector_ends_at_any_moment() -> None:
    """As where arrays in memory that is shared belong to objects that refer to each other."""

    def program(comm: Communicator) -> None:
        arena, told = Arena(comm), []
        arena.changed = lambda: told.append(list(arena.held()))
        for moment in range(25):
            for _ in range(4):
                cycle: list[object] = [arena.allocate(8)]
                cycle.append(cycle)
            del cycle
            kept, memory = arena.allocate(8)
            hoard = [(i, i) for i in range(3000)]  # leaves none that may be used again, without the collector
            gc.set_threshold(gc.get_count()[0] + moment)
            gc.enable()
            place = arena.locate(memory[0])
            gc.disable()
            del hoard
            gc.collect()
            assert place == Place(kept, 0)
            assert told[-1] == list(arena.held()) == [kept]

    thresholds = gc.get_threshold()
    gc.disable()
    try:
        LocalWorld(1, timeout_s=20).run(program)
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()
