"""Tasks farmed over ranks: outcomes, balance, failures, on every number of ranks."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mpitrain import LocalWorld, Outcome, map_tasks, trace
from mpitrain._errors import DataError, InputError, PeerError, TaskError
from mpitrain.comm import Communicator, objects
from mpitrain.comm.launch import library
from mpitrain.comm.local import alone


@pytest.mark.mpi
@pytest.mark.parametrize("count", [0, 1, 2, 11])
def test_all_ranks_get_all_outcomes_in_the_order_of_the_items(world, count):
    factor = np.arange(3)  # closures need not be pickled
    found = map_tasks(lambda item: item * factor, range(count), world)
    assert [outcome.item for outcome in found] == list(range(count))
    for item, outcome in enumerate(found):
        np.testing.assert_array_equal(outcome.value, [0, item, 2 * item])
        assert outcome.error is None
        assert 0 <= outcome.rank < world.size
    told = world.allgather_object([(outcome.rank, outcome.seconds) for outcome in found])
    assert all(each == told[0] for each in told)


@pytest.mark.mpi
def test_the_items_are_those_of_rank_0(world):
    found = map_tasks(str, [f"of rank {world.rank}"], world)
    assert [outcome.value for outcome in found] == ["of rank 0"]


@pytest.mark.mpi
def test_ranks_that_are_free_take_the_tasks(world):
    count = 30
    found = map_tasks(time.sleep, [0.5, *[0.01] * count], world)
    by_rank = Counter(outcome.rank for outcome in found[1:])
    assert sum(by_rank.values()) == count
    if world.size > 1:
        assert by_rank[found[0].rank] < count / world.size  # what a division in equal parts would give it
        assert len(by_rank.keys() | {found[0].rank}) == world.size


@pytest.mark.mpi
def test_each_rank_computes_in_its_own_process(world):
    pids = world.allgather_object(os.getpid())
    for outcome in map_tasks(lambda _: (time.sleep(0.01), os.getpid())[1], range(3 * world.size), world):
        assert outcome.value == pids[outcome.rank]


@pytest.mark.mpi
def test_the_dearest_begin_first(world):
    order: list[int] = []
    costs = [1.0, 3.0, 2.0, 5.0, 4.0]
    found = map_tasks(lambda item: time.monotonic(), range(5), world, costs=costs, on_outcome=_item_into(order))
    assert [outcome.item for outcome in found] == list(range(5))
    if world.size == 1:
        assert order == [3, 4, 1, 2, 0]
    assert sorted(order) == (list(range(5)) if world.rank == 0 else [])


def _item_into(items):
    return lambda outcome: items.append(outcome.item)


class Stubborn:
    """Can be pickled, and not be made again."""

    def __reduce__(self):
        return (int, ("no number",))


class Broken:
    """Cannot be pickled for a mistake of its own."""

    def __getstate__(self):
        raise AttributeError("no such field")


def test_a_mistake_in_an_objects_own_method_keeps_its_traceback():
    with pytest.raises(AttributeError, match="no such field") as caught:
        objects.dump(Broken())
    assert caught.traceback[-1].name == "__getstate__"
    with pytest.raises(InputError, match="the object cannot be pickled; got "):
        objects.dump(lambda: 0)


def _misbehave(how):
    match how:
        case "raise":
            raise ValueError("no such point")
        case "user's":
            raise DataError("labels out of range", remedy="look at them")
        case "exit":
            raise SystemExit(3)
        case "unpicklable":
            return lambda: 0
        case "stubborn":
            return Stubborn()
    return how


@pytest.mark.mpi
def test_a_task_that_fails_is_an_outcome_beside_the_others(world):
    told: list[Outcome] = []
    items = ["a", "raise", "b", "user's", "exit", "unpicklable", "stubborn", "c"]
    found = {outcome.item: outcome for outcome in map_tasks(_misbehave, items, world, on_outcome=told.append)}
    assert list(found) == items
    assert {item for item, outcome in found.items() if outcome.error is None} == {"a", "b", "c"}
    assert [found[item].value for item in "abc"] == ["a", "b", "c"]
    assert 'raise ValueError("no such point")' in found["raise"].error
    assert found["raise"].error.endswith("ValueError: no such point")
    assert found["user's"].error == "labels out of range; look at them"
    assert found["exit"].error.endswith("SystemExit: 3")
    assert found["unpicklable"].error.startswith("map_tasks: what it returned cannot be sent between ranks: ")
    assert "\n" not in found["unpicklable"].error
    assert "InputError" not in found["unpicklable"].error  # said once
    assert found["stubborn"].error.startswith("what it returned cannot be unpickled: ValueError: ")
    with pytest.raises(TaskError, match=r"(?s)item 'raise' failed on rank \d: Traceback.*ValueError: no such point"):
        _ = found["raise"].value
    assert sorted(outcome.item for outcome in told) == (sorted(items) if world.rank == 0 else [])


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"items": [1, lambda: 0]}, "map_tasks: item 1 cannot be sent between ranks: "),
        ({"items": [1, 2], "costs": [1.0]}, "map_tasks: not one cost per item; got 1; expected 2"),
    ],
)
def test_what_cannot_be_farmed_is_one_line_on_all_ranks(world, arguments, text):
    with pytest.raises(InputError if world.rank == 0 else PeerError) as caught:
        map_tasks(abs, comm=world, **arguments)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.mpi
def test_an_error_of_the_caller_drops_what_was_not_begun_and_reaches_all_ranks(world):
    began = []

    def refuse(outcome):
        raise OSError("disk full")

    def note(item):
        time.sleep(0.02)
        began.append(item)

    with pytest.raises(OSError if world.rank == 0 else PeerError, match="disk full"):
        map_tasks(note, range(100), world, on_outcome=refuse)
    assert world.allreduce(len(began)) < 100
    assert [outcome.value for outcome in map_tasks(abs, [-1, -2], world)] == [1, 2]  # the ranks still serve


@pytest.mark.mpi
def test_tasks_may_use_a_communicator_of_their_own(world):
    found = map_tasks(lambda item: int(alone().allreduce(item)), range(5), world)
    assert [outcome.value for outcome in found] == list(range(5))


@pytest.mark.mpi
def test_tasks_are_in_the_trace(world, tmp_path):
    path = Path(world.broadcast_object(str(tmp_path))) / "trace.json"
    with trace(path, world):
        found = map_tasks(time.sleep, [0.01] * 6, world)
    events = json.loads(path.read_text())["traceEvents"]
    seen = Counter(event["pid"] for event in events if event.get("name") == "task")
    assert seen == Counter(outcome.rank for outcome in found)


def test_in_a_local_world_rank_0_computes():
    def program(comm: Communicator) -> list[tuple[int, int]]:
        return [(outcome.value, outcome.rank) for outcome in map_tasks(abs, [-1, -2, -3], comm)]

    assert LocalWorld(3).run(program) == [[(1, 0), (2, 0), (3, 0)]] * 3


DYING = """
import os, signal, sys, time
from mpitrain import map_tasks, world
comm = world()
def task(item):
    time.sleep(0.05)
    if comm.rank == 1:
        {die}
map_tasks(task, range(100), comm)
print("not reached")
"""


KILLED = pytest.param("os.kill(os.getpid(), signal.SIGKILL)", id="killed")
LEFT = pytest.param("os._exit(0)", id="left", marks=pytest.mark.slow)


@pytest.mark.parametrize("die", [KILLED, LEFT])
def test_a_rank_that_dies_ends_the_job_and_is_named(launch, die):
    begin = time.monotonic()
    code, output = launch(3, DYING.format(die=die))
    assert time.monotonic() - begin < 30
    assert code not in (0, None)
    assert "rank 1" in output or library().kind != "openmpi"  # MPICH's tells the number of the process
    assert "not reached" not in output
