"""What the benchmark computes: statistics, bandwidths, buffers, set-ups of MPI libraries, and the race itself."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mpitrain._errors import CommunicationError, InputError
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.comm.bench import meeting, ranks
from mpitrain.comm.bench.cases import VARIANTS, Contender, correct, handed_in, shapes
from mpitrain.comm.bench.components import components, disabled
from mpitrain.comm.bench.ground import MOST_BUFFERS, Ground, Stage, buffers_for
from mpitrain.comm.bench.meeting import Place, meet
from mpitrain.comm.bench.ranks import Bench, chosen
from mpitrain.comm.bench.results import (
    Copy,
    Launch,
    Measurement,
    Quantiles,
    Report,
    Rivalry,
    bus_bandwidth,
    geometric_mean,
)
from mpitrain.comm.bench.spec import OPERATIONS, Spec
from mpitrain.comm.machine import last_level_cache_bytes
from mpitrain.comm.timing import race
from mpitrain.comm.transports.network import NetworkTransport


def test_quantiles_of_numbers_that_are_known() -> None:
    assert Quantiles.of(np.arange(101.0)) == Quantiles(101, 10.0, 25.0, 50.0, 75.0, 90.0)
    assert Quantiles.of(np.array([2.0])) == Quantiles(1, 2.0, 2.0, 2.0, 2.0, 2.0)
    assert Quantiles.of(np.array([2e-6 / 3])).p50 == 6.667e-7


def test_ratios_are_paired_turn_by_turn() -> None:
    ours, theirs = np.array([1.0, 10.0, 100.0]), np.array([2.0, 30.0, 100.0])  # the machine slows down all the while
    found = Rivalry.of(theirs, ours)
    assert found.ratio.p50 == 2.0  # that of the medians would be 3
    assert found.behind_s.p50 == -1.0
    assert found.seconds.p50 == 30.0


def test_rounds_are_joined_by_their_medians() -> None:
    rounds = [Quantiles.of(np.full(n, value)) for n, value in ((3, 1.0), (3, 2.0), (5, 90.0))]
    assert Quantiles.across(rounds) == Quantiles(11, 2.0, 2.0, 2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [("allreduce", 1.5), ("broadcast", 1.0), ("reduce_scatter", 0.75), ("allgather", 0.75)],
)
def test_bus_bandwidth_is_what_an_optimal_algorithm_sends_per_rank_and_second(operation: str, expected: float) -> None:
    assert bus_bandwidth(operation, 4, 1000, 0.5) == expected * 2000
    assert bus_bandwidth(operation, 1, 1000, 0.5) == 0.0


def test_geometric_mean() -> None:
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert math.isnan(geometric_mean([]))


RIVALRY = Rivalry.of(np.array([2.0, 4.0]), np.array([1.0, 1.0]))
MEASURED = Measurement("allreduce", "plan", "shared", 4, 4, Quantiles.of(np.ones(2)), {"mpi4py": RIVALRY})
LAUNCH = Launch("default", 1, {"ranks": 2}, [Copy(4, 1, Quantiles.of(np.ones(2)))], [MEASURED], ["a note"])


def test_reports_are_read_as_they_were_written() -> None:
    report = Report(["mpitrain"], [LAUNCH, replace(LAUNCH, component="sm")], ["han: skipped"])
    text = report.to_json()
    assert Report.from_json(text) == report
    found = json.loads(text)
    assert found["version"] == 1
    assert found["launches"][0]["measurements"][0]["rivals"]["mpi4py"]["ratio"] == {
        "count": 2, "p10": 2.2, "p25": 2.5, "p50": 3.0, "p75": 3.5, "p90": 3.8
    }  # fmt: skip
    assert Launch.from_json(LAUNCH.to_json()) == LAUNCH


@pytest.mark.parametrize("text", [b"", b"{}", b'{"command": [], "launches": [{}], "failures": []}'])
def test_anything_else_is_refused(text: bytes) -> None:
    with pytest.raises(InputError, match="benchmark results: not what a benchmark writes"):
        Report.from_json(text)


def test_measurements_of_a_set_up_over_all_rounds() -> None:
    slower = replace(MEASURED, seconds=Quantiles.of(np.full(2, 3.0)), rivals={})
    report = Report([], [LAUNCH, replace(LAUNCH, round=2, measurements=[slower])], [])
    (found,) = report.measurements("default").values()
    assert found.seconds.p50 == 2.0
    assert found.rivals == {}  # it was not there in every round
    assert report.measurements("sm") == {}
    assert report.copies("default")[4].seconds.count == 4


def test_a_task_is_read_as_it_was_written() -> None:
    spec = Spec((4, 8), ("broadcast",), repeats=3, gloo=True, command=("mpitrain", "bench"))
    assert Spec.from_json(spec.to_json()) == spec


def test_names_of_variants_are_different_and_each_operation_has_a_leading_one() -> None:
    names = [(each.operation, each.name) for each in VARIANTS]
    assert len(set(names)) == len(names)
    leading = chosen(Spec((4,), leading=True))
    assert {each.operation for each in leading} == set(OPERATIONS)
    assert {each.name for each in leading} == {each.name for each in VARIANTS if each.leading} < {n for _, n in names}
    assert {each.name for each in chosen(Spec((4,), ("allgather",), variants=("ring", "plan")))} == {"ring"}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_shapes_and_what_is_correct(operation: str, ranks: int) -> None:
    """Our own collectives as threads are the oracle of the shapes, and plain NumPy that of the values."""

    def program(comm: Communicator) -> list[bool]:
        send, recv = shapes(operation, 24, ranks)
        first = handed_in(send, "float64")
        x = first * (comm.rank + 1)
        result = getattr(comm, operation)(x)
        right = partial(correct, operation, comm.rank, ranks, first)
        wrong, shifted = result.copy(), np.roll(result, 1)
        wrong.reshape(-1)[-1] += 1
        return [result.shape == recv, right(result), not right(wrong), not right(shifted)]

    assert all(itertools.chain(*LocalWorld(ranks, timeout_s=30).run(program)))


@pytest.mark.parametrize(
    ("kind", "size_bytes", "expected"),
    [
        ("resident", 2**20, 1),
        ("rewritten", 2**20, 1),
        ("rotating", 2**20, 33),
        ("rotating", 2**30, 3),
        ("rotating", 4, MOST_BUFFERS),
    ],
)
def test_rotating_buffers_are_twice_the_cache_and_odd(kind: str, size_bytes: int, expected: int) -> None:
    assert buffers_for(kind, size_bytes, cache_bytes=32 * 2**20) == expected


def test_the_last_cache(tmp_path: Path) -> None:
    for number, (level, size) in enumerate([("1", "48K"), ("3", "32768K\n"), ("2", "1M"), ("4", "none")]):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        (folder / "level").write_text(level)
        (folder / "size").write_text(size)
    (tmp_path / "index3" / "level").unlink()
    assert last_level_cache_bytes(tmp_path) == 32 * 2**20


def test_a_race_gives_the_slowest_rank_and_takes_buffers_in_turn() -> None:
    used: list[tuple[str, int]] = []

    def program(comm: Communicator) -> np.ndarray:
        def call(name: str, number: int) -> None:
            if comm.rank == 0:
                used.append((name, number))
            time.sleep(0.03 if (name, comm.rank) == ("slow", 1) else 0.001)

        contenders = [[lambda n=name, i=i: call(n, i) for i in range(3)] for name in ("slow", "quick")]
        return race(comm, contenders, 3)

    one, two = LocalWorld(2, timeout_s=30).run(program)
    assert one.shape == (3, 2)
    assert np.array_equal(one, two)
    assert one[:, 0].min() >= 0.03 > 0.02 > np.median(one[:, 1])
    assert [number for _, number in used] == [0, 1, 2, 0, 1, 2]
    assert [name for name, _ in used] == ["slow", "quick", "quick", "slow", "slow", "quick"]


def test_before_each_turn_its_own_preparation_is_done_outside_of_the_time() -> None:
    done: list[str] = []

    def slow(name: str) -> None:
        time.sleep(0.02)
        done.append(f"before {name}")

    calls = [[lambda n=name, i=i: done.append(f"{n}{i}") for i in range(3)] for name in ("a", "b")]
    before = [[lambda n=name, i=i: slow(f"{n}{i}") for i in range(3)] for name in ("a", "b")]
    taken = LocalWorld(1, timeout_s=30).run(lambda comm: race(comm, calls, 2, before))[0]
    assert done == [word for turn in ("a0", "b1", "b2", "a0") for word in (f"before {turn}", turn)]
    assert taken.max() < 0.01


@pytest.mark.parametrize(
    ("buffers", "size_bytes", "turns"),
    [("resident", 1000, "oooorrrr"), ("resident", 1001, "oorr"), ("rotating", 1000, "or")],
)
def test_of_resident_buffers_each_turn_follows_calls_of_its_own(
    monkeypatch: pytest.MonkeyPatch, buffers: str, size_bytes: int, turns: str
) -> None:
    """Three, so that what fits into the last cache lies there; one where it does not."""
    monkeypatch.setattr(ranks, "last_level_cache_bytes", lambda: 1000)
    done: list[str] = []
    ours, rival = (Contender(name, [lambda n=name: done.append(n[0])], [], [], False) for name in ("ours", "rival"))

    def program(comm: Communicator) -> np.ndarray:
        spec = Spec((4,), repeats=1, buffers=buffers)
        return Bench(SimpleNamespace(world=comm), spec, {}, [])._race(ours, rival, size_bytes)

    assert LocalWorld(1, timeout_s=30).run(program)[0].shape == (1, 2)
    assert "".join(done).endswith(turns)
    assert len(done) == 4 * len(turns)  # three trials


def test_of_an_odd_number_of_buffers_both_contenders_use_all() -> None:
    used: list[tuple[str, int]] = []
    count = buffers_for("rotating", 2**30, 1)
    calls = [[lambda n=name, i=i: used.append((n, i)) for i in range(count)] for name in ("ours", "theirs")]
    LocalWorld(1, timeout_s=30).run(lambda comm: race(comm, calls, 2 * count))
    assert set(used) == {(name, i) for name in ("ours", "theirs") for i in range(count)}


def test_ranks_that_have_nodes_to_themselves_meet_the_transport_between_them() -> None:
    """And another set-up of the library is met on that alone: beside ``host`` it would run on both sides."""

    def program(comm: Communicator, component: str) -> list[str]:
        comm._transport = NetworkTransport(comm)
        stage = Stage(comm)
        for mine in set(stage._comms.values()):
            mine._transport = mine._transport or NetworkTransport(mine)
        spec = Spec((64,), ("allreduce",), repeats=2, variants=("checked", "plan in place"), component=component)
        found = [*Bench(stage, spec, {}, []).size("allreduce", 64)]
        return [f"{each.variant}, {each.transport}" for each in found]

    for component, expected in (
        ("default", ["checked, host", "checked, network", "plan in place, host", "plan in place, network"]),
        ("han", ["checked, network", "plan in place, network"]),
    ):
        assert LocalWorld(2, timeout_s=30).run(partial(program, component=component)) == [expected] * 2


def copying(operation: str, x: np.ndarray, y: np.ndarray, in_place: bool) -> Callable[[], np.ndarray]:
    """A rival that communicates nothing: what it gives is right on one rank only."""

    def call() -> np.ndarray:
        np.copyto(y, x.reshape(y.shape))
        return y

    return call


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rival_that_gives_wrong_results_is_left_out_with_a_note(ranks: int) -> None:
    def program(comm: Communicator) -> tuple[list[Measurement], list[str]]:
        notes: list[str] = []
        spec = Spec((64,), ("allgather",), repeats=2, variants=("checked",))
        bench = Bench(Stage(comm), spec, {"mpi4py": copying}, notes)
        return list(bench.size("allgather", 64)), notes

    for (found,), notes in LocalWorld(ranks, timeout_s=30).run(program):
        assert found.seconds.count == 2
        assert list(found.rivals) == (["mpi4py"] if ranks == 1 else [])
        assert notes == ([] if ranks == 1 else ["mpi4py: no allgather of float32, or a wrong one; left out"])


@pytest.mark.parametrize("lie", [lambda x, y: x, lambda x, y: y], ids=["the input", "what the one before wrote"])
def test_a_wrong_result_of_ours_is_an_error(lie: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    lies = replace(VARIANTS[0], name="a lie", bind=lambda comm, x, y: partial(lie, x, y))
    monkeypatch.setattr("mpitrain.comm.bench.ranks.VARIANTS", (VARIANTS[0], lies))

    def program(comm: Communicator) -> None:
        list(Bench(Stage(comm), Spec((64,), repeats=2), {}, []).size("allreduce", 64))

    with pytest.raises(CommunicationError, match="allreduce: a lie gave a wrong result"):
        LocalWorld(2, timeout_s=30).run(program)


def test_a_rival_of_calls_on_node_memory_has_the_memory_that_it_is_fastest_on() -> None:
    """As `Communicator.empty` gives it where nothing is shared; other calls and their rivals use the same arrays."""
    variants = {each.name: each for each in VARIANTS if each.operation == "allreduce"}
    ground = Ground("allreduce", 1 << 20, "float32", 2, 1)
    for make, planned in ((ground.rival, 2), (ground.always_in_place, 1)):
        (ordinary, placed) = (make("a rival", copying, variants[name]) for name in ("checked", "plan"))
        pages = [array.ctypes.data % 4096 for array in (*placed.inputs, *placed.outputs)]
        assert pages == [0] * planned
        assert all(not np.shares_memory(array, pair) for array in placed.inputs for pair in ground.pairs[0])
        assert any(ordinary.inputs[0] is array for array in ground.pairs[0])


def test_ranks_meet_at_the_loopback_of_one_machine() -> None:
    places = LocalWorld(3, timeout_s=30).run(meet)
    assert places == [Place("127.0.0.1", "lo")] * 3


def test_ranks_meet_where_all_of_them_get_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 offers three addresses; rank 2 reaches the last only, and is known there by one of its own."""
    offered = {"127.0.0.1": "lo", "10.0.0.1": "eth0", "10.1.0.1": "ib0"}
    ranks = threading.local()

    def reach(address: str, port: int) -> str:
        sources = {0: address, 1: address, 2: {"10.1.0.1": "10.1.0.3"}.get(address, "")}
        return sources[ranks.number]

    monkeypatch.setattr(meeting, "_source", reach)
    monkeypatch.setattr(meeting, "addresses", lambda: offered if ranks.number < 2 else {"10.1.0.3": "ib1"})

    def program(comm: Communicator) -> Place | None:
        ranks.number = comm.rank
        return meet(comm)

    found = LocalWorld(3, timeout_s=30).run(program)
    assert found == [Place("10.1.0.1", "ib0"), Place("10.1.0.1", "ib0"), Place("10.1.0.1", "ib1")]
    offered.pop("10.1.0.1")
    assert LocalWorld(3, timeout_s=30).run(program) == [None] * 3


def test_set_ups_of_open_mpi() -> None:
    found = {each.name: each for each in components("openmpi")}
    assert next(iter(found)) == "default"
    assert found["default"].settings == {}
    assert found["sm"].settings == {"OMPI_MCA_coll_sm_priority": "100"}
    assert found["sm"].operations == ("allreduce", "broadcast")
    tuned = [each for name, each in found.items() if name.startswith("tuned")]
    assert [each.settings["OMPI_MCA_coll_tuned_allreduce_algorithm"] for each in tuned] == list("123456")
    assert all(each.settings["OMPI_MCA_coll_tuned_use_dynamic_rules"] == "1" for each in tuned)
    assert {each.needs for each in tuned} == {"tuned"}


def test_set_ups_of_others() -> None:
    assert [each.name for each in components("unknown")] == ["default"]
    assert len(components("mpich")) > 1
    assert all(name.startswith("MPIR_CVAR_") for each in components("mpich") for name in each.settings)


SELECTIONS = """\
[n:1] coll:base:comm_select: new communicator: MPI_COMM_WORLD (cid 0)
[n:1] coll:base:comm_select: selecting          sm, priority {}
[n:2] coll:base:comm_select: new communicator: MPI COMM 3 SPLIT_TYPE FROM 0 (cid 3)
[n:1] coll:base:comm_select: selecting         han, priority  35, Enabled
[n:2] coll:base:comm_select: selecting       adapt, priority 100, Enabled
"""


def test_open_mpi_tells_whether_a_component_takes_part_among_all_ranks() -> None:
    sm, han, adapt = (each for each in components("openmpi") if each.name in ("sm", "han", "adapt"))
    assert disabled(sm, SELECTIONS.format("100, Enabled")) is None
    assert "does not enable its component sm" in (disabled(sm, SELECTIONS.format("  0, Disabled")) or "")
    assert disabled(han, SELECTIONS) is None
    assert disabled(adapt, SELECTIONS) is not None  # on a node only
    assert disabled(sm, "") is not None
    assert disabled(components("openmpi")[0], "") is None
