"""What a communicator holds of the MPI library is given back when it is freed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conformance import same

from mpitrain import _env
from mpitrain._errors import CommunicationError, InputError, MismatchError
from mpitrain.comm import Communicator
from mpitrain.comm.calls import Call, Handle
from mpitrain.comm.local import alone
from mpitrain.comm.transports import choice

CYCLES = 2000


def use(comm: Communicator) -> None:
    """Let a communicator make all that it makes for itself."""
    assert comm.node.size
    assert comm.leaders is None or comm.leaders.size
    comm.node.allreduce(1, algorithm="hierarchical")  # the node's own node
    assert comm.allreduce(1, algorithm="hierarchical") == comm.size


def test_what_was_begun_is_kept_though_the_rest_cannot_be_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    comm = alone()
    begin, begun = comm._begin, list[Handle]()

    def begin_one(call: Call) -> Handle:
        if begun:
            raise CommunicationError("no more")
        begun.append(begin(call))
        return begun[0]

    monkeypatch.setattr(comm, "_begin", begin_one)
    with pytest.raises(CommunicationError, match="no more"):
        comm.iallreduce([np.zeros(1), np.zeros(1, "f4")])
    assert comm._under_way == begun  # for its memory is still in use


class FailsOnce:
    """A request of MPI's that fails and is forgotten, as they are."""

    failed = False

    def Wait(self, status: object) -> bool:  # noqa: N802
        from mpi4py import MPI

        if not self.failed:
            self.failed = True
            raise MPI.Exception(MPI.ERR_TRUNCATE)
        return True

    Test = Wait


@pytest.mark.mpi
@pytest.mark.parametrize("looks", [0, 2])
def test_what_failed_fails_whenever_it_is_waited_for_and_nothing_else_does(world: Communicator, looks: int) -> None:
    from mpitrain.comm.mpi import _MpiHandle

    handle = _MpiHandle(Call("broadcast", recv=np.zeros(2), root=0), FailsOnce())  # type: ignore[arg-type]
    for _ in range(looks):
        assert handle.test()
    world._under_way.append(handle)
    assert world.iallreduce(1).wait() == world.size
    for _ in range(2):
        with pytest.raises(MismatchError, match="another rank sent more"):
            handle.wait()


@pytest.mark.mpi
def test_memory_is_let_go_of_once_its_call_was_waited_for(world: Communicator) -> None:
    x = np.ones(3)
    seen, request = weakref.ref(x), world.iallreduce(x, out=x)
    request.wait()
    del request, x
    assert seen() is None


@pytest.mark.mpi
def test_no_plan_outlives_its_communicator(world: Communicator) -> None:
    with world.split(0) as part:
        plans: list[Callable[[], object]] = [part.allreduce_plan(np.ones(n), in_place=n > 3) for n in (3, 100_000)]
        plans.append(part.allreduce_plan(part.empty(100_000)))
        for buffer in (np.ones(100), part.empty(100), part.shared(100)):
            scatter = part.reduce_scatter_plan(buffer, in_rank_order=True)
            plans += [scatter, part.allgather_plan(buffer, scatter.begin, scatter.end)]
        for plan in plans:
            plan()
    for plan in plans:
        with pytest.raises(CommunicationError, match="the communicator was freed"):
            plan()


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:mpitrain")


@pytest.mark.mpi
@pytest.mark.parametrize("loops", ["on", "off"])
def test_the_memory_of_its_node_goes_with_it(world: Communicator, loops: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPITRAIN_KERNEL", loops)
    gc.collect()
    before = mapped()
    gc.disable()  # for what refers to itself stays until it runs
    try:
        with world.split(0) as part:
            x = np.ones(1000)
            same(part.allreduce(x), np.full(1000, float(world.size)))
            name, plan = part.transport, part.allreduce_plan(x)
            if part.node.size == part.size > 1 and _env.transport() is None:
                assert name == "shared", part.transport_reason
            assert mapped() - before == (name == "shared")
        assert part.transport == name
        assert mapped() - before == (name == "shared" and loops == "on")  # through which the plan passes its array
        del plan
        assert mapped() == before
    finally:
        gc.enable()


@pytest.mark.mpi
@pytest.mark.parametrize("ranks_per_node", ["1", "2", "4"])
def test_what_it_made_for_itself_goes_with_it(
    world: Communicator, ranks_per_node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpi4py import MPI

    from mpitrain.comm.mpi import MpiCommunicator

    made: list[MpiCommunicator] = []
    child = MpiCommunicator._child

    def remembered(self: MpiCommunicator, *args: Any) -> MpiCommunicator | None:
        found = child(self, *args)
        made.extend([found] if found is not None else [])
        return found

    monkeypatch.setenv("MPITRAIN_RANKS_PER_NODE", ranks_per_node)
    monkeypatch.setattr(MpiCommunicator, "_child", remembered)
    monkeypatch.setattr(choice, "needs_barrier", lambda: True)  # a window as well
    comm = world.split(0)
    assert comm is not None
    use(comm)
    users = comm.split(0)
    assert users is not None
    assert comm.transport in ("host", "network", "shared")
    comm.free()
    alive = [each for each in made if each._comm != MPI.COMM_NULL]
    assert alive == [users]
    same(users.allreduce(1), world.size)
    users.free()


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.timeout(300)  # a minute on two quiet cores
def test_thousands_of_communicators_one_after_the_other(world: Communicator) -> None:
    if world.size != 2:
        pytest.skip("on two ranks")
    for _ in range(CYCLES):
        comm = world.split(0)
        assert comm is not None
        with comm:
            use(comm)


@pytest.mark.mpi
@pytest.mark.slow
def test_hundreds_of_shared_memory_transports_one_after_the_other(world: Communicator) -> None:
    for _ in range(CYCLES // 10):
        comm = world.split(0)
        assert comm is not None
        with comm:
            x = comm.empty(20_000)
            x[...] = 1
            comm.allreduce(x, out=x)
            assert x[-1] == comm.size


@pytest.mark.mpi
@pytest.mark.parametrize("option", ["algorithm", "reproducible"])
def test_methods_that_do_not_block_take_no_algorithm(world: Communicator, option: str) -> None:
    calls: list[Callable[..., Any]] = [world.iallreduce, world.ireduce, world.ibroadcast, world.ireduce_scatter]
    for call in [*calls, world.iallgather]:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            call(np.zeros(world.size), **{option: "ring"})


@pytest.mark.mpi
def test_only_communicators_of_mpi4py_are_taken(world: Communicator) -> None:
    for wrong in ("world", world):
        with pytest.raises(InputError, match=r"from_mpi: comm is of another kind; got .*; expected a communicator of"):
            Communicator.from_mpi(wrong)  # type: ignore[arg-type]
