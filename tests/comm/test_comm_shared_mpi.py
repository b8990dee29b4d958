"""The shared-memory transport under ``mpiexec``: processes that map each other's memory, on one node and on several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import shared_checks
from conformance import CHECKS, folded, same, values

from mpitrain._errors import MismatchError
from mpitrain.comm import Communicator
from mpitrain.comm.transports import choice

Check = Callable[[Communicator], None]

pytestmark = pytest.mark.filterwarnings("ignore:.* was dropped without wait:ResourceWarning")


@pytest.fixture(params=["compiled", "numpy"])
def eager(
    request: pytest.FixtureRequest, world: Communicator, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Communicator]:
    """A communicator that reduces everything over shared memory, in chunks of a few elements."""
    shared_checks.use_loops(request.param, monkeypatch)
    shared_checks.cut_small(monkeypatch, streamed_from_bytes=9)  # what a transport is agreed on by stays below
    with world.split(0, axis="world") as comm:
        yield comm


@pytest.mark.mpi
@pytest.mark.parametrize("check", [*shared_checks.CHECKS, *CHECKS], ids=lambda check: check.__name__)
def test_processes_over_shared_memory(eager: Communicator, check: Check) -> None:
    assert eager.transport == _fitting(eager)
    check(eager)


def _fitting(comm: Communicator) -> str:
    """The transport for the nodes as they are: one, or several where the tests are run over a network."""
    sizes = set(comm.allgather(comm.node.size).tolist())
    if comm.size == 1 or len(sizes) > 1:
        return "host"
    return "network" if sizes == {1} else "shared"


@pytest.mark.mpi
@pytest.mark.parametrize(  # compiled loops serve one node only
    "eager", [pytest.param("compiled", marks=pytest.mark.slow), "numpy"], indirect=True
)
@pytest.mark.parametrize("check", shared_checks.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    ("variable", "value"),
    [("MPITRAIN_TRANSPORT", "host"), ("MPITRAIN_RANKS_PER_NODE", "1"), ("MPITRAIN_RANKS_PER_NODE", "2")],
)
def test_without_shared_memory_and_on_small_nodes(
    eager: Communicator, check: Check, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert eager.transport == ("host" if variable == "MPITRAIN_TRANSPORT" else _fitting(eager))
    check(eager)


@pytest.mark.mpi
def test_a_memory_barrier_of_mpis_where_the_machine_needs_one(
    eager: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "needs_barrier", lambda: True)
    x = eager.empty(1000)
    for _ in range(20):
        x[...] = values(eager.rank, x.shape)
        eager.allreduce(x, out=x)
        same(x, folded(eager.size, x.shape, "float32", "sum"))


@pytest.mark.mpi
def test_planned_small_arrays_meet_once(world: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    shared_checks.use_loops("compiled", monkeypatch)
    with world.split(0) as comm:
        if comm.transport != "shared" or comm.node.size < comm.size:
            pytest.skip("the ranks are not on one node that shares its memory")
        team = comm._transport._kernel._team
        for elements, meetings in ((1, 1), (384, 1), (385, 2)):
            for in_place in (False, True):
                x = comm.empty(elements)
                plan = comm.allreduce_plan(x, in_place=in_place)
                for _ in range(3):
                    x[...], before = values(comm.rank, x.shape), team.fence
                    same(plan(), folded(comm.size, x.shape, "float32", "sum"))
                    assert team.fence - before == meetings


@pytest.mark.mpi
def test_ranks_go_on_after_a_mismatch_of_what_loops_reduce_and_what_they_do_not(
    world: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_checks.use_loops("compiled", monkeypatch)
    with world.split(0) as comm:
        if comm.transport != "shared" or comm.node.size < comm.size:
            pytest.skip("the ranks are not on one node that shares its memory")
        dtype, op = (np.complex64, "prod") if comm.rank == 0 else (np.float32, "sum")
        for size in (100_000, 200_000):
            with pytest.raises(MismatchError):
                comm.allreduce(np.ones(size, dtype), op)
            x = values(comm.rank, (5000,), "float32")
            same(comm.allreduce(x), folded(comm.size, x.shape, "float32", "sum"))


@pytest.mark.mpi
def test_many_random_collectives(world: Communicator) -> None:
    """At the real thresholds: sizes about the chunk, shared and ordinary, planned and not, in the same random order."""
    rng = np.random.default_rng(3)
    with world.split(0) as comm:
        x, y = comm.empty(400_000, "int32"), np.empty(400_000, np.int32)
        plans = [comm.allreduce_plan(x[:100_000]), comm.allreduce_plan(x, in_place=True), comm.allreduce_plan(y)]
        for _ in range(150):
            kind, size, shift = int(rng.integers(4)), int(rng.integers(1, 400_000)), int(rng.integers(100))
            for buffer in (x, y):
                buffer[...] = np.arange(400_000) * (comm.rank + shift)
            expected = np.arange(400_000) * sum(rank + shift for rank in range(comm.size))
            if kind < 3:
                got = plans[kind]()
                assert np.array_equal(got, expected[: got.size])
            else:
                target = (x, y)[int(rng.integers(2))]
                comm.allreduce(target[:size], out=target[:size])
                assert np.array_equal(target[:size], expected[:size])


_KILLED = """
import os, signal, sys, numpy as np, mpitrain
world = mpitrain.world()
x = world.empty(1 << 20)
world.allreduce(x, out=x)
print(f"transport {world.transport}", flush=True)
if world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
world.allreduce(x, out=x)
"""


def test_a_killed_rank_leaves_no_file(launch: Callable[..., tuple[int | None, str]]) -> None:
    def files() -> set[str]:
        return {path.name for path in Path("/dev/shm").glob("*mpitrain*")}

    before = files()
    code, output = launch(2, _KILLED, timeout_s=40)
    assert code not in (0, None), output
    assert "transport shared" in output
    assert files() == before
