"""Traces: that the file is what viewers take, that it tells all that the ledger counts, and what is left of a crash."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from traces import check_format, read, told

import mpitrain
from mpitrain._errors import InputError, StorageError
from mpitrain.comm import Communicator, LocalWorld, clocks
from mpitrain.comm.tracing import _stretched
from mpitrain.comm.watchdog import Watch

Launch = Callable[..., tuple[int | None, str]]


def counted(comm: Communicator) -> Counter[tuple[str, str]]:
    return Counter({key: count.calls for key, count in comm.ledger.snapshot().items() if key[0] != "trace"})


def exercise(comm: Communicator, part: Communicator) -> None:
    """Use every kind of call: blocking, nonblocking, planned, fused, of parts, objects, and messages."""
    plan = comm.allreduce_plan(comm.empty(1000, np.float32))
    request = comm.iallreduce(np.ones(3))
    for _ in range(3):
        plan()
        comm.allreduce({"a": np.ones(5), "b": np.ones(7, np.int32)}, "max")
        with comm.phase("think"):
            part.barrier()
    comm.broadcast(np.zeros(4), root=comm.size - 1)
    comm.allreduce(np.ones(10), algorithm="ring")
    comm.allgather_object("x" * comm.rank)
    comm.sendrecv(np.ones(2), (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size)
    comm.node.allgather(np.ones(1))
    comm.scatter(np.ones((comm.size, 2)))
    request.wait()
    inner = comm.split(0, axis="inner")
    assert inner is not None
    inner.reduce(np.ones(2), root=0)
    inner.free()


def record(comm: Communicator, path: Path) -> tuple[Counter[tuple[str, str]], list[Counter[tuple[str, str]]]]:
    part = comm.split(0, axis="part")  # before the trace begins
    assert part is not None
    assert all(each.transport for each in (comm, part, comm.node))  # chosen now: the ledger leaves that out
    with mpitrain.trace(path, comm):
        before = counted(comm)
        exercise(comm, part)
        now = counted(comm)
    part.free()
    return now - before, comm.allgather_object(now - before)


def shared_folder(comm: Communicator, tmp_path: Path) -> Path:
    return Path(comm.broadcast_object(str(tmp_path)))


COMPARED_US = 50
"""As well as clocks are compared, on a busy machine."""


@pytest.mark.mpi
@pytest.mark.parametrize("debug", [False, True])
def test_every_call_that_the_ledger_counts_is_one_event(world: Communicator, tmp_path: Path, debug: bool) -> None:
    path = shared_folder(world, tmp_path) / "trace.json"
    was, world.debug = world.debug, debug
    _, ledgers = record(world, path)
    world.debug = was
    events = read(path)
    check_format(events, world.size)
    for rank, ledger in enumerate(ledgers):
        own = told(events, rank)
        assert own == ledger
        assert own["world", "allreduce_plan"] == own["part", "barrier"] == 3
        assert own["world", "iallreduce"] == own["inner", "reduce"] == 1
    assert list(path.parent.iterdir()) == [path]  # no parts are left
    world.barrier()


def test_threads_are_ranks_too(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    ledgers = LocalWorld(3).run(lambda comm: record(comm, path)[0])
    events = read(path)
    check_format(events, 3)
    assert [told(events, rank) for rank in range(3)] == ledgers


def test_an_event_says_what_a_person_asks(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    def program(comm: Communicator) -> None:
        with mpitrain.trace(path, comm):
            comm.reduce({"a": np.ones(5), "b": np.ones((2, 3))}, "max", root=1, algorithm="tree")
            comm.isend(np.ones(2, np.int16), 1 - comm.rank, tag=7).wait() if comm.rank else comm.recv(
                np.ones(2, np.int16), 1, tag=7
            )
            with comm.phase("forward"):
                time.sleep(0.01)

    LocalWorld(2).run(program)
    events = {(e["pid"], e["ph"], e["name"]): e for e in read(path)}
    reduced = events[0, "X", "reduce"]["args"]
    assert reduced.pop("at").startswith(str(Path(__file__).relative_to(Path.cwd())))
    assert reduced == {
        "communicator": "world", "ranks": 2, "dtype": "float64", "elements": 11, "bytes": 88, "op": "max", "root": 1,
        "algorithm": "tree",
    }  # fmt: skip
    sent, got = events[1, "b", "isend"]["args"], events[0, "X", "recv"]["args"]
    message = {"dtype": "int16", "elements": 2, "bytes": 4, "tag": 7}
    assert sent.items() >= {**message, "peer": 0}.items()
    assert got.items() >= {**message, "peer": 1}.items()
    assert (1, "X", "wait isend") in events
    assert events[1, "e", "isend"]["id"] == events[1, "b", "isend"]["id"]
    forward = events[0, "X", "forward"]
    assert (forward["tid"], forward["cat"]) == (0, "phase")
    assert 10_000 <= forward["dur"] < 1_000_000  # µs


@pytest.mark.mpi
def test_a_late_rank_is_seen_on_the_others(world: Communicator, tmp_path: Path) -> None:
    path = shared_folder(world, tmp_path) / "trace.json"
    with mpitrain.trace(path, world):
        for _ in range(5):
            world.barrier()
        if world.rank == world.size - 1:
            time.sleep(0.2)
        world.barrier()
    rows = [[e for e in read(path) if e["name"] == "barrier" and e["pid"] == r] for r in range(world.size)]
    for same in zip(*rows, strict=True):  # nobody leaves before the last has come, on whichever clock
        assert max(e["ts"] for e in same) <= min(e["ts"] + e["dur"] for e in same) + COMPARED_US
    waits_us = [row[-1]["dur"] for row in rows]
    assert all(wait > 150_000 for wait in waits_us[:-1])
    assert world.size == 1 or waits_us[-1] < 100_000
    world.barrier()


@pytest.mark.parametrize("drift", [0.0, 0.2])
def test_clocks_that_differ_are_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drift: float) -> None:
    import threading

    def skewed() -> int:  # one clock for each thread: rank r's is r hours ahead, and too fast
        rank = int(threading.current_thread().name.removeprefix("rank "))
        return int(time.monotonic_ns() * (1 + rank * drift)) + rank * 3_600_000_000_000

    for module in ("clocks", "recorder"):
        monkeypatch.setattr(f"mpitrain.comm.{module}.monotonic_ns", skewed)
    path = tmp_path / "trace.json"

    def program(comm: Communicator) -> None:
        with mpitrain.trace(path, comm):
            for _ in range(8):
                time.sleep(0.02 if comm.rank else 0.05)
                comm.barrier()

    LocalWorld(3).run(program)
    events = read(path)
    check_format(events, 3)
    rows = [[e for e in events if e["name"] == "barrier" and e["pid"] == rank] for rank in range(3)]
    for same in zip(*rows, strict=True):
        ends = [e["ts"] + e["dur"] for e in same]
        assert max(ends) - min(ends) < 25_000  # µs; threads take turns, and drift uncorrected is 80 ms
        assert max(e["ts"] for e in same) < min(ends) + 2_000


@pytest.mark.mpi
def test_clocks_of_one_node_are_found_to_be_one(world: Communicator) -> None:
    reading = clocks.compare(world)
    assert abs(reading.offset_ns) <= max(reading.error_ns, 1) < 50_000_000


@pytest.mark.mpi
def test_nothing_is_different_without_a_trace(world: Communicator, tmp_path: Path) -> None:
    part = world.split(0)
    assert part is not None
    before = {comm: dict(vars(comm)) for comm in (world, part)}
    watches = {comm: sorted(vars(comm._watch)) for comm in before}
    with mpitrain.trace(shared_folder(world, tmp_path) / "trace.json", world):
        assert "_start" in vars(part)
        assert type(part._watch) is not Watch
        assert part._entry is None  # a trace must be told of every call
        with pytest.raises(InputError, match=r"^trace: is being traced already"), mpitrain.trace("x.json", part):
            pass
    for comm, was in before.items():
        now = dict(vars(comm))
        assert now.keys() == was.keys()
        assert (now.pop("_entry") is None) == (was.pop("_entry") is None)
        assert {key for key in was if now[key] is not was[key]} <= {"_splits"}
        assert type(comm._watch) is Watch
        assert sorted(vars(comm._watch)) == watches[comm]
    assert world.phase("nothing") is world.phase("more")
    part.free()


@pytest.mark.mpi
def test_no_more_than_the_limit_is_kept(world: Communicator, tmp_path: Path) -> None:
    path, notes = shared_folder(world, tmp_path) / "trace.json", []
    with mpitrain.trace(path, world, max_events=10, on_note=notes.append):
        for _ in range(25):
            world.barrier()
    events = read(path)
    check_format(events, world.size)
    for rank in range(world.size):
        own = [event for event in events if event["pid"] == rank]
        assert sum(event.get("cat") == "comm" for event in own) == 10
        assert [e["name"] for e in own if e["ph"] == "i"] == ["limit of 10 events reached"]
    other = json.loads(path.read_text())["otherData"]
    assert [each["dropped"] for each in other["ranks"]] == [15] * world.size
    assert len(notes) == (world.size if world.rank == 0 else 0)
    assert all("15 events of rank" in note and "max_events" in note for note in notes)
    world.barrier()


def test_what_cannot_be(tmp_path: Path) -> None:
    def program(comm: Communicator) -> None:
        with pytest.raises(InputError, match="max_events is too small; got 0; expected at least 1"):
            mpitrain.trace(tmp_path / "trace.json", comm, max_events=0).__enter__()
        with pytest.raises(StorageError, match=r"^trace: .*No such file or directory; name a file in a directory"):
            mpitrain.trace(tmp_path / "missing" / "trace.json", comm).__enter__()

    LocalWorld(1).run(program)


def test_a_full_disk_costs_events_and_not_the_run(tmp_path: Path) -> None:
    path, notes = tmp_path / "trace.json", []

    def program(comm: Communicator) -> None:
        with mpitrain.trace(path, comm, on_note=notes.append):
            comm.barrier()
            recorder = comm._recorder
            assert recorder is not None
            recorder._write()
            recorder._close_file()
            with (tmp_path / "trace.rank0.json").open("a") as part:
                part.write('{"ts":12.5,"du')  # what fitted
            recorder._file = Path("/dev/full").open("w")  # noqa: SIM115
            comm.barrier()
            recorder._write()
            comm.barrier()

    LocalWorld(1).run(program)
    assert sum(event["name"] == "barrier" for event in read(path)) == 1
    assert notes == [f"{path}: 2 events of rank 0 are missing: [Errno 28] No space left on device"]


RAISES = """
import sys, time
import numpy as np
import mpitrain
from mpitrain.comm import abort_on_uncaught
comm = mpitrain.world()
abort_on_uncaught(comm)
with mpitrain.trace(sys.argv[1], comm):
    for step in range(20):
        with comm.phase("step"):
            comm.allreduce(np.ones(3))
            time.sleep(0.02)
        if step == 15 and comm.rank == 1:
            raise ValueError("on purpose")
"""


def test_a_rank_that_raises_leaves_the_parts(launch: Launch, tmp_path: Path) -> None:
    code, output = launch(2, RAISES, str(tmp_path / "trace.json"))
    assert code == 1, output
    assert output.count("on purpose") >= 1
    assert not (tmp_path / "trace.json").exists()
    raised, aborted = (read(tmp_path / f"trace.rank{rank}.json") for rank in (1, 0))
    assert sum(event["name"] == "allreduce" for event in raised) == 16
    assert sum(event["name"] == "allreduce" for event in aborted) >= 5  # but for the last tenth of a second


def test_corrected_times_nest_as_before() -> None:
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.integers(0, 10**6, 200))
    lines = [f'{{"ts":{a / 1e3:.3f},"dur":{(b - a) / 1e3:.3f},"ph":"X"}},\n' for a, b in pairwise(cuts.tolist())]
    for rate in (1.0, 1 - 3e-5, 1 + 7e-6):
        found = [json.loads(_stretched(line, rate).rstrip(",\n")) for line in lines]
        assert [round(e["ts"] * 1e3) for e in found] == [round(cut * rate) for cut in cuts[:-1].tolist()]
        for one, other in pairwise(found):
            assert round((one["ts"] + one["dur"]) * 1e3) == round(other["ts"] * 1e3)
    assert _stretched('{"ph":"M"},\n', 2.0) == '{"ph":"M"},\n'
    assert _stretched('{"ts":1.500,"id":"0.1","ph":"b"},\n', 2.0) == '{"ts":3.000,"id":"0.1","ph":"b"},\n'
