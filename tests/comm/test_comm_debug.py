"""The parts of the guard by themselves, and that debug mode lets every right program pass."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conformance import CHECKS

import mpitrain
from mpitrain._errors import InputError, MismatchError
from mpitrain.comm import Communicator, LocalWorld, Request
from mpitrain.comm.calls import Call, Prepared
from mpitrain.comm.callsite import call_site
from mpitrain.comm.debug import fingerprint, shapes
from mpitrain.comm.tables import table
from mpitrain.comm.watchdog import Watch

Launch = Callable[..., tuple[int | None, str]]
X = np.zeros(3)


def test_the_call_site_is_the_callers_line_whatever_library_lies_between() -> None:
    @contextmanager
    def managed() -> object:
        yield call_site()

    with managed() as inside:
        pass
    by_library = functools.reduce(lambda found, _: [*found, call_site()], range(2), [])
    sites = [inside, call_site(), *by_library]
    assert {site.rpartition(":")[0].rpartition("/")[2] for site in sites} == {"test_comm_debug.py"}
    assert len({site.rpartition(":")[2] for site in sites}) == 3


def test_a_program_beside_the_package_is_the_users() -> None:
    names: dict[str, object] = {"call_site": call_site}
    exec(compile("site = call_site()", f"{Path(mpitrain.__file__).parent}_study/train.py", "exec"), names)
    assert str(names["site"]).endswith("mpitrain_study/train.py:1")  # and not a line of ours, called from here


def test_a_table_is_aligned_and_sorted_by_rank() -> None:
    rows = {10: ("barrier()", "at b.py:2"), 2: ("allreduce(float64[3])", "at a.py:1"), 3: ("gone", "")}
    assert table(rows).splitlines() == [
        "  rank  2: allreduce(float64[3])  at a.py:1",
        "  rank  3: gone",
        "  rank 10: barrier()              at b.py:2",
    ]


def test_of_long_calls_a_table_shows_where_they_differ() -> None:
    parts = [f"(float64[{size}])" for size in range(100)]
    texts = ["#1 allgather" + " + ".join([*parts[:50], odd, *parts[51:]]) for odd in ("(int8[7])", "(bool[7])")]
    first, second = table({0: (texts[0], "here"), 1: (texts[1], "there")}).splitlines()
    assert "(int8[7])" in first
    assert "(bool[7])" in second
    assert max(len(first), len(second)) < 150


def test_what_ranks_must_agree_on() -> None:
    call = Call("allreduce", dtype=X.dtype, recv=X, op="sum")
    assert fingerprint(Prepared("allreduce", [call], lambda: None, X)) == "allreduce(float64[3], op=sum)"
    assert fingerprint(Prepared("iallreduce", [call], lambda: None)) == "iallreduce(float64[3], op=sum)"
    two = Prepared("allreduce", [call, call], lambda: None, {"b": X, "a": [X.reshape(1, 3)]})
    assert fingerprint(two) == (
        "allreduce(float64[3], op=sum) + (float64[3], op=sum) of {'a': [(1, 3)], 'b': (3,)}"
    )  # fmt: skip
    rows = Call("allgather", dtype=X.dtype, send=X, recv=X, counts=(1, 2))
    assert fingerprint(Prepared("allgather", [rows], lambda: None, np.zeros((1, 4)))) == (
        "allgather(float64, counts=[1, 2]) of (…, 4)"
    )
    assert shapes(1.5) == " of ()"
    assert str(Prepared("barrier", [Call("barrier")], lambda: None)) == "barrier()"
    message = Call("recv", dtype=X.dtype, recv=X, peer=1, tag=7)
    assert str(Prepared("recv", [message], lambda: None)) == "recv(float64[3]) from rank 1, tag 7"


def test_the_watchdog_sees_single_calls_that_wait() -> None:
    watch = Watch("world", chosen_s=2.0)
    assert not any(watch.overdue(now) for now in range(100))  # computes all the time
    watch.current = "barrier()"
    assert [watch.overdue(100 + now) for now in (0, 1, 2, 2.1, 3)] == [False, False, False, True, True]
    for now in range(200, 300):  # one short call after the other, which are one object in a plan
        watch.count += 1
        assert not watch.overdue(now)
    watch.chosen_s = 0.0
    assert not any(watch.overdue(now) for now in range(300, 400))
    watch.chosen_s, watch.checking = 2.0, True  # debug mode has a deadline of its own
    assert not any(watch.overdue(now) for now in range(400, 500))


def test_the_watchdog_keeps_no_array_of_a_call_that_it_has_seen() -> None:
    watch, x = Watch("world"), np.zeros(3)
    gone = weakref.ref(x)
    watch.current = Prepared("barrier", [Call("barrier")], lambda: None, x)
    del x
    assert watch.waited_s(100.0) == 0
    assert watch.waited_s(101.0) == 1
    watch.current = None
    assert gone() is None


def test_timeouts() -> None:
    def program(comm: Communicator) -> tuple[float, float]:
        default = comm.timeout_s
        comm.timeout_s = 3
        for wrong in (-1, float("nan"), "soon", None):
            with pytest.raises(InputError, match=r"timeout_s is not a time; got .*; expected seconds, or 0"):
                comm.timeout_s = wrong
        return default, comm.timeout_s

    assert LocalWorld(1).run(program) == [(600.0, 3.0)]


def test_an_unusable_timeout_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPITRAIN_TIMEOUT_S", "10 min")
    with pytest.raises(InputError, match=r"^MPITRAIN_TIMEOUT_S is not a time; got '10 min'; expected seconds, or 0"):
        Watch("world")
    monkeypatch.setenv("MPITRAIN_TIMEOUT_S", "12.5")
    assert Watch("world").timeout_s == 12.5


class _Handle:
    def wait(self) -> None:
        """Nothing to wait for."""

    def test(self) -> bool:
        return True


def test_a_request_that_is_dropped_warns() -> None:
    with pytest.warns(
        ResourceWarning, match=r"^iallreduce\(…\) was dropped without wait\(\): its result and its errors"
    ):
        Request([_Handle()], lambda: None, "iallreduce(…)")


@pytest.mark.parametrize("seen", ["wait", "test"])
def test_a_request_that_was_seen_through_does_not(seen: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        request = Request([_Handle()], lambda: None, "iallreduce(…)")
        getattr(request, seen)()
        del request
        gc.collect()


@pytest.mark.mpi
@pytest.mark.filterwarnings("ignore:.* was dropped without wait:ResourceWarning")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_right_programs_pass_in_debug_mode(world: Communicator, check: Callable[[Communicator], None]) -> None:
    part = world.split(int(world.rank > 0), axis="world")
    assert part is not None
    with part:
        part.debug = True
        check(part)


@pytest.mark.mpi
def test_it_may_be_switched_off_and_on_again_after_an_error(world: Communicator) -> None:
    with world.split(0) as part:
        for _ in range(20 if world.size > 1 else 0):
            part.debug = True
            with pytest.raises(MismatchError, match=r"#1 allreduce"):
                part.allreduce(np.zeros(5 + (part.rank == 0)))
            part.debug = False


@pytest.mark.mpi
def test_a_sendrecv_meets_a_send_and_a_recv(world: Communicator) -> None:
    part = world.split(0)
    assert part is not None
    part.debug = True
    right, left = (part.rank + 1) % part.size, (part.rank - 1) % part.size
    x = np.full((2, 3), part.rank)
    if part.rank % 2:
        request = part.isend(x, right)
        got = part.recv(x, left)
        request.wait()
    else:
        got = part.sendrecv(x, right, left)
    assert np.array_equal(got, np.full((2, 3), left))
    part.free()


@pytest.mark.mpi
def test_what_is_split_inherits(world: Communicator) -> None:
    part = world.split(0)
    assert part is not None
    was = world.debug
    part.debug, part.timeout_s = True, 17
    child = part.split(part.rank, axis="child")
    assert child is not None
    assert (child.debug, child.timeout_s) == (True, 17)
    part.debug = False
    assert not part.debug
    assert world.debug == was
    child.free()
    part.free()


PATIENT = """
import sys, time
from mpitrain.comm import world
comm = world()
for timeout_s, nap_s in ((0.5, 0), (0, 1.2)):
    comm.timeout_s = 10
    comm.barrier()
    comm.timeout_s = timeout_s
    time.sleep(nap_s * comm.rank)
    comm.barrier()
    if timeout_s:
        time.sleep(1.2)  # nobody waits
comm.timeout_s = 10
comm.ibarrier()
comm.barrier()
sys.stdout.write("well\\n")
"""


@pytest.mark.parametrize("debug", [False, True])
def test_neither_computing_nor_a_timeout_of_0_is_an_error(debug: bool, launch: Launch) -> None:
    code, output = launch(2, PATIENT, MPITRAIN_DEBUG=str(int(debug)))
    assert code == 0, output
    assert output.count("well") == 2
    assert output.count("ibarrier() was dropped without wait(), begun at") == 2 * debug
    assert "longer than timeout_s" not in output


FREED = """
from mpitrain.comm import Communicator, world
from mpi4py import MPI
whole = Communicator.from_mpi(MPI.COMM_WORLD)
whole.debug = True
part = whole.split(0)
whole.free()
assert part.debug and part.allreduce(1) == part.size
part.free()
for _ in range(300):  # nothing is left behind
    Communicator.from_mpi(MPI.COMM_WORLD).free()
"""


def test_a_part_outlives_the_whole(launch: Launch) -> None:
    code, output = launch(2, FREED)
    assert (code, output) == (0, "")
