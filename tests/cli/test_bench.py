"""``mpitrain bench collectives``: tables, figure, the campaign of launches, and the command as people run it."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from commands import TIMEOUT_S, mpitrain
from rich.console import Console
from virtual_nodes import VirtualNodes, missing

from mpitrain.cli.bench import campaign, command, plot, tables
from mpitrain.cli.bench.campaign import Failed, run_campaign, task
from mpitrain.comm.bench.cases import VARIANTS
from mpitrain.comm.bench.components import DEFAULT, Component
from mpitrain.comm.bench.results import Copy, Launch, Measurement, Quantiles, Report, Rivalry
from mpitrain.comm.bench.spec import Spec

SM = Component("sm", {"OMPI_MCA_coll_sm_priority": "100"}, ("allreduce",))
ABOUT = {
    "ranks": 2,
    "ranks_of_nodes": [2],
    "machine": {"cpu": "CPU", "cpus": 2, "last_level_cache_bytes": 2**25},
    "mpi_library": "Open MPI v5",
    "tuning": [],
    "dtype": "float32",
    "buffers": "resident",
}


def times(seconds: float) -> np.ndarray:
    return np.full(3, seconds)


def measured(size: int, ours_s: float, variant: str = "plan", **rivals_s: float) -> Measurement:
    rivals = {name: Rivalry.of(times(theirs), times(ours_s)) for name, theirs in rivals_s.items()}
    return Measurement("allreduce", variant, "shared", size, size, Quantiles.of(times(ours_s)), rivals)


def launch(component: str, *found: Measurement) -> Launch:
    copies = [Copy(size, 1, Quantiles.of(times(1e-6 * size))) for size in (4, 1024)]
    return Launch(component, 1, ABOUT, copies, list(found))


REPORT = Report(
    ["mpitrain"],
    [
        launch("default", measured(4, 2e-6, mpi4py=1e-6, gloo=8e-6), measured(1024, 1e-6, mpi4py=4e-6, gloo=16e-6)),
        launch("sm", measured(4, 3e-6, mpi4py=9e-6), measured(1024, 1e-6, mpi4py=2e-6)),
    ],
    ["han: not there; skipped"],
)


def test_a_row_of_the_table() -> None:
    first, second = tables.measured_rows(REPORT, "allreduce")
    assert dict(zip(tables.COLUMNS, first, strict=True)) == {
        "size": "4", "mpitrain": "plan", "transport": "shared", "median µs": "2.00", "p10–p90 µs": "2.00–2.00",
        "bus GB/s": "0.002", "of copy": "200%", "mpi4py µs": "1.00", "ratio": "0.50", "Δ µs": "+1.00",
    }  # fmt: skip
    assert (second[0], second[-2:]) == ("1K", ("4.00", "-3.00"))


def test_the_best_rival_is_compared_with_ours_of_its_own_launch() -> None:
    rows = tables.summary_rows(REPORT, "allreduce", "plan", "shared")
    assert rows == [
        ("4", "default", "1.00", "2.00", "0.50", "0.50", "4.00"),
        ("1K", "sm", "2.00", "1.00", "4.00", "2.00", "16.00"),
        ("mean", "", "", "", "1.41", "1.00", "8.00"),
    ]
    assert tables.summary_rows(REPORT, "allreduce", "checked", "host") == []


def test_the_best_rival_is_the_one_that_ours_is_least_ahead_of() -> None:
    """Not the one of the smallest time, which may come from a launch in which the machine was faster."""
    slow = launch("sm", measured(4, 3e-6, mpi4py=6e-6))
    report = Report(["mpitrain"], [launch("default", measured(4, 1e-6, mpi4py=4e-6)), slow], [])
    best = tables.best_rival(report, ("allreduce", "plan", "shared", 4))
    assert (best.name, best.rivalry.ratio.p50) == ("sm", 2.0)


def test_all_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show(REPORT, Console(width=150))
    printed = capsys.readouterr().out
    assert "2 ranks on 1 node, Open MPI v5" in printed
    assert "allreduce: bus bandwidth = 2(p−1)/p · n / t" in printed
    assert "allreduce, plan (shared): ratio to the rivals" in printed
    assert "left out: han: not there; skipped" in printed


def test_nodes_that_are_parts_of_one_are_told() -> None:
    parts = replace(REPORT.launches[0], about={**ABOUT, "ranks_of_nodes": [1, 1], "ranks_per_node": 1})
    first = next(tables.header(replace(REPORT, launches=[parts])))
    assert first == "2 ranks on 2 nodes (MPITRAIN_RANKS_PER_NODE=1), Open MPI v5"


def test_the_figure(tmp_path: Path) -> None:
    plot.draw(REPORT, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    above, below, legend = plot.figure(REPORT).axes
    assert (above.get_xscale(), above.get_yscale(), below.get_yscale()) == ("log", "log", "log")
    labels = [text.get_text() for text in legend.get_legend().get_texts()]
    assert labels == ["plan (shared)", "mpi4py", "gloo", "best rival"]
    assert list(above.lines[-1].get_ydata()) == [1.0, 2.0]  # best rival, µs


@pytest.mark.parametrize(
    ("ours_s", "expected"),
    [((1.01e-6, 0.99e-6), {"1", "0.995"}), ((4e-6, 0.7e-6), {"0.5", "1"}), ((1e-6 / 30, 30e-6), {"0.1", "1", "10"})],
)
def test_ratios_near_one_have_plain_ticks(ours_s: tuple[float, float], expected: set[str]) -> None:
    own = [measured(size, seconds, mpi4py=1e-6) for size, seconds in zip((4, 1024), ours_s, strict=True)]
    made = plot.figure(Report([], [launch("default", *own)], []))
    made.canvas.draw()
    below = made.axes[1].yaxis
    found = {text.get_text() for text in (*below.get_majorticklabels(), *below.get_minorticklabels())} - {""}
    assert expected <= found
    assert all(label == f"{float(label):g}" for label in found)
    assert len(found) < 15


def test_a_set_up_that_fails_is_given_up_and_the_others_go_on() -> None:
    told: list[str] = []
    asked: list[tuple[str, int]] = []

    def start(component: Component, number: int) -> Launch | Failed:
        asked.append((component.name, number))
        return Failed("no end after 9 s") if component.name == "sm" else launch(component.name)

    launches, failures = run_campaign((DEFAULT, SM, Component("basic")), 2, start, told.append)
    assert asked == [("default", 1), ("sm", 1), ("basic", 1), ("default", 2), ("basic", 2)]
    assert [each.component for each in launches] == ["default", "basic", "default", "basic"]
    assert failures == ["sm: no end after 9 s; skipped"]
    assert told[0] == "round 1 of 2: default"


def test_a_set_up_measures_what_it_performs_and_gloo_runs_beside_the_default_only() -> None:
    spec = Spec((4,), ("broadcast", "allreduce"), gloo=True)
    own, other = task(spec, DEFAULT, 1), task(spec, SM, 2)
    assert (own.operations, own.leading, own.gloo) == (("broadcast", "allreduce"), False, True)
    assert (other.operations, other.leading, other.gloo, other.round) == (("allreduce",), True, False, 2)


def pretend(source: str) -> campaign.Start:
    """Let what starts ranks be a Python script that is given the arguments of a rank."""
    return lambda argv: ([sys.executable, "-c", source, *argv], dict(os.environ))


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import time; time.sleep(60)", "no end after 1 s"),
        ("raise SystemExit('an error of the network')", "exit code 1: an error of the network"),
        ("", "no result: "),
        ("import sys; open(sys.argv[5], 'w').write('{')", "no result: benchmark results: not what"),
    ],
)
def test_launches_that_hang_or_crash_are_told_in_a_line(source: str, why: str) -> None:
    found = campaign.launcher(pretend(source), Spec((4,)), limit_s=1.0)(DEFAULT, 1)
    assert isinstance(found, Failed)
    assert found.why.startswith(why)
    assert "\n" not in found.why


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, though shells let what they start in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_asks_the_launcher_to_end_its_ranks(tmp_path: Path) -> None:
    told = tmp_path / "told"
    waits = f"import signal, sys, time; signal.signal(15, lambda *_: sys.exit(open({str(told)!r}, 'w').write('asked')))"
    start = pretend(f"{waits}\nopen({str(told)!r}, 'w').close()\ntime.sleep(60)")

    def interrupt() -> None:
        while not told.exists():
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        campaign.launcher(start, Spec((4,)), limit_s=20.0)(DEFAULT, 1)
    assert told.read_text() == "asked"


def test_a_launch_has_the_settings_of_its_set_up_and_hands_back_a_result(tmp_path: Path) -> None:
    told = tmp_path / "told"
    start = pretend(
        f"import os, sys; open({str(told)!r}, 'w').write(os.environ['OMPI_MCA_coll_sm_priority'])\n"
        f"open(sys.argv[5], 'wb').write({launch('sm').to_json()!r})"
    )
    found = campaign.launcher(start, Spec((4,)), limit_s=20.0)(SM, 1)
    assert found == launch("sm")
    assert told.read_text() == "100"
    nothing = campaign.launcher(start, Spec((4,), ("allgather",)), limit_s=20.0)(SM, 1)
    assert nothing == Failed("performs allreduce only, of which nothing was chosen to compare")


def test_a_component_without_effect_is_skipped_before_it_is_measured() -> None:
    start = pretend("print('coll:base:comm_select: selecting sm, priority   0, Disabled')")
    found = campaign.launcher(start, Spec((4,)), limit_s=20.0)(Component("sm", {}, ("allreduce",), "sm"), 1)
    assert found == Failed("Open MPI does not enable its component sm for these ranks")


# The command itself.


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def bench(*arguments: str, under: int = 0, timeout_s: float = TIMEOUT_S) -> Any:
    return mpitrain("bench", "collectives", *arguments, under=under, timeout_s=timeout_s)


def test_started_by_itself_it_measures_every_variant(tmp_path: Path, caches: Path) -> None:
    path, figure = tmp_path / "found.json", tmp_path / "figure.svg"
    done = bench("-n", "2", "--sizes", "4", "--repeats", "2", f"--json={path}", f"--plot={figure}")
    assert done.code == 0, done.err
    assert done.err == "round 1 of 1: default\n"
    assert "\x1b" not in done.out
    report = Report.from_json(path.read_bytes())
    (found,) = report.launches
    assert report.failures == found.notes == []
    assert {"cpu", "cpus", "last_level_cache_bytes"} <= found.about["machine"].keys()
    assert {"python", "mpitrain", "numpy", "mpi4py"} <= found.about["versions"].keys()
    assert found.about["command"] == report.command
    assert report.command[:3] == ["mpitrain", "bench", "collectives"]  # and not where that is installed
    transports = found.about["transports"]
    wanted = {
        (each.operation, each.name, transport, 4)
        for each in VARIANTS for transport in each.transports if transport in transports
    }  # fmt: skip
    assert {each.key for each in found.measurements} == wanted
    assert all(each.seconds.count == 2 and 0 < each.seconds.p10 <= each.seconds.p90 for each in found.measurements)
    assert all(each.rivals["mpi4py"].ratio.p50 > 0 for each in found.measurements)
    assert {each.total_bytes for each in found.measurements if each.operation == "allgather"} == {8}
    assert figure.read_text().startswith("<?xml")


@pytest.mark.parametrize("ranks", [0, 2])
def test_alone_and_under_mpiexec_one_rank_prints(ranks: int, caches: Path) -> None:
    few = ("--sizes=4", "--operations=broadcast,allreduce", "--variants=checked", "--repeats=2")
    done = bench(*few, "--buffers=rotating", under=ranks)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0].startswith(f"{ranks or 1} rank")
    assert "rotating through pairs of arrays per rank: 4: 255 (in the cache)" in done.out
    assert done.out.count("broadcast: bus bandwidth = n / t") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sizes=4,x"], "'x' is no size; expected bytes, e.g. 4,64,1K"),
        (["--sizes=0"], "'0' is no size"),
        (["--operations=scan"], "no 'scan'; expected some of allreduce, broadcast"),
        (["--variants=magic"], "no 'magic'; expected some of checked, checked in place"),
        (["--variants=plan", "--operations=broadcast"], "none of --variants is a way to call broadcast"),
        (["-n2", "--launcher=mpiexec -n 2"], "--launcher is the whole command that starts ranks, its -n included"),
        (["--tune", "--launcher=srun"], "here: srun mpitrain bench collectives"),
        (["--launcher=mpiexecc -n 2"], "--launcher: there is no command 'mpiexecc'"),
        (["--json=nowhere/figures.json"], "'nowhere' is no folder that can be written to; make it first"),
        (["--plot=nowhere/figure.png"], "'nowhere' is no folder that can be written to; make it first"),
        (["--plot=figure"], "--plot: the name tells no format; got figure; expected an end of .png"),
    ],
)
def test_mistakes_are_told_before_anything_starts(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(command, ["collectives", *arguments])
    assert done.exit_code != 0
    assert words in f"{done.output}{done.exception}"


CHOICES = """
import warnings
warnings.simplefilter("always")
import mpitrain
comm = mpitrain.world()
rows = None if comm.tuning is None else comm.tuning.describe()
choice = None if rows is None else comm.tuning.choose("allreduce", 64, comm.size)
assert comm.allgather_object((rows, choice)) == [(rows, choice)] * comm.size
assert comm.ledger.snapshot().keys() <= {("world", "allgather_object")}
assert comm.allreduce(1) == comm.size
if comm.rank == 0:
    print(rows, choice)
"""


def test_what_tune_keeps_later_programs_use(caches: Path, launch: Callable[..., tuple[int | None, str]]) -> None:
    done = bench("-n", "2", "--tune", "--sizes=64", "--operations=allreduce", "--repeats=2")
    assert done.code == 0, done.err
    (path,) = (caches / "mpitrain" / "tuning").iterdir()
    assert f"kept in {path}" in done.out
    table = json.loads(path.read_text())
    assert [(row["operation"], row["total_bytes"]) for row in table["rows"]] == [("allreduce", 64)]
    table["rows"][0]["algorithm"] = "tree"  # whatever was the fastest
    path.write_text(json.dumps(table))
    assert launch(2, CHOICES) == (0, "['allreduce: tree'] tree\n")
    assert launch(2, CHOICES, MPITRAIN_TUNING="off") == (0, "None None\n")
    assert launch(2, CHOICES, MPITRAIN_TRANSPORT="host") == (0, "None None\n")
    again = bench("-n", "2", "--tune", "--sizes=64", "--operations=broadcast", "--repeats=2")
    assert again.code == 0, again.err
    rows = json.loads(path.read_text())["rows"]
    assert [row["operation"] for row in rows] == ["allreduce", "broadcast"]
    assert rows[0]["algorithm"] == "tree"  # as it was
    path.write_text("{")
    code, output = launch(2, CHOICES)
    assert (code, output.splitlines()[-1]) == (0, "None None")
    assert output.count("tuning table ignored") == 1
    assert str(path) in output


def bench_on_nodes(ranks_per_node: int, path: Path, patch: pytest.MonkeyPatch, *arguments: str) -> tuple[Report, str]:
    with VirtualNodes(2) as nodes:
        patch.setenv("PATH", nodes.env["PATH"])
        command = shlex.join(nodes.launcher(ranks_per_node))
        options = ("--sizes=64,1M", "--repeats=2", f"--json={path}", *arguments)
        done = bench(f"--launcher={command}", *options, timeout_s=280)  # with peers, some ten launches
    assert done.code == 0, done.err
    return Report.from_json(path.read_bytes()), done.out


@pytest.mark.skipif(bool(missing()), reason=f"no virtual nodes: {missing()}")
@pytest.mark.parametrize(
    ("ranks_per_node", "transport"), [(1, "network"), pytest.param(2, "shared", marks=pytest.mark.slow)]
)
def test_on_several_nodes(
    ranks_per_node: int, transport: str, tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--operations=allreduce", "--variants=checked,plan in place,reproducible")
    report, printed = bench_on_nodes(ranks_per_node, tmp_path / "found.json", monkeypatch, *few)
    (found,) = report.launches
    assert printed.startswith(f"{2 * ranks_per_node} ranks on 2 nodes, ")
    assert found.about["ranks_of_nodes"] == [ranks_per_node] * 2
    measured = {(each.variant, each.transport) for each in found.measurements}
    wanted = {
        (name, where) for name in ("checked", "plan in place", "reproducible") for where in ("host", transport)
    }  # fmt: skip
    assert measured == wanted


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(bool(missing()), reason=f"no virtual nodes: {missing()}")
def test_against_the_peers_of_several_nodes(tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("--operations=allreduce,broadcast", "--variants=checked", "--sizes=64", "--peers")
    report, _ = bench_on_nodes(2, tmp_path / "found.json", monkeypatch, *few)
    assert {"default", "han", "adapt", "basic"} < set(report.components())
    assert "sm: Open MPI does not enable its component sm for these ranks; skipped" in report.failures
    assert {each.transport for each in report.measurements("han").values()} == {"shared", "host"}
    assert all(key[2] == "shared" for key in report.measurements("han") if key[0] == "allreduce")
    gloo = {name for each in report.launches[0].measurements for name in each.rivals} - {"mpi4py"}
    assert gloo == ({"gloo"} if importlib.util.find_spec("torch") else set())


@pytest.mark.slow
def test_against_all_peers(tmp_path: Path, caches: Path) -> None:
    path = tmp_path / "found.json"
    arguments = ("--sizes=64", "--variants=checked,plan", "--repeats=3", "--peers", f"--json={path}")
    with_peers = mpitrain("bench", "collectives", "-n", "2", *arguments)
    assert with_peers.code == 0, with_peers.err
    report = Report.from_json(path.read_bytes())
    named = {*report.components(), *(failure.partition(":")[0] for failure in report.failures)}
    assert {"default", "sm", "han", "adapt", "basic"} < named or "Open MPI" not in report.launches[0].about[
        "mpi_library"
    ]
    assert "allreduce, checked (host): ratio to the rivals" in with_peers.out
