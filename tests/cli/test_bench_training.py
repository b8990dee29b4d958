"""``mpitrain bench training``: the command as people run it, on tiny batches, and what its figures are made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from commands import mpitrain
from rich.console import Console

from mpitrain.cli.bench import command, training_plot, training_tables
from mpitrain.cli.bench.training import _without_ranks
from mpitrain.comm.bench.results import Quantiles
from mpitrain.train.bench.communication import share_of
from mpitrain.train.bench.memory import Memory, held_bytes
from mpitrain.train.bench.ranks import ALONE, METHODS
from mpitrain.train.bench.results import Contestant, Trained, TrainingReport

TINY = ("--models=mlp256", "--batch=2", "--rounds=2", "--round-s=0")
OURS = [*METHODS, ALONE]
PRODUCTS = [784 * 256, 256 * 256, 256 * 10]


def measured(tmp_path: Path, ranks: int, *more: str) -> tuple[TrainingReport, str]:
    path = tmp_path / "found.json"
    done = mpitrain("bench", "training", f"-n{ranks}", *TINY, f"--json={path}", *more)
    assert done.code == 0, done.err
    return TrainingReport.from_json(path.read_bytes()), done.out


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_started_by_itself_it_measures_every_method(ranks: int, tmp_path: Path) -> None:
    report, printed = measured(tmp_path, ranks, f"--plot={tmp_path / 'figure.svg'}")
    assert (report.about["ranks"], report.about["rounds"]) == (ranks, 2)
    assert report.command[:4] == ["mpitrain", "bench", "training", "--models=mlp256"]
    assert {"mpitrain", "numpy", "mpi4py"} < report.about["versions"].keys()
    assert report.notes == ["PyTorch left out: not asked for (--peers)"]
    assert report.notes[0] in printed
    (model,) = report.models
    assert [each.name for each in model.contestants] == OURS
    assert model.flops == 2 * 2 * (3 * sum(PRODUCTS) - PRODUCTS[0])
    assert model.parameters == sum(PRODUCTS) + 256 + 256 + 10
    for each in model.contestants:
        assert each.seconds.count == 2
        assert each.per_s == pytest.approx(ranks * 2 / each.seconds.p50, rel=1e-3)
        own = each.share_of_products * each.seconds.p50 * report.product_flops_per_s
        assert own == pytest.approx(model.flops, rel=1e-3)
        assert each.ratios.keys() == {"data", ALONE} - {each.name}
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")
    _check_memory(model, ranks)


def _check_memory(model: Trained, ranks: int) -> None:
    """What is predicted is there; a rank has less of it where it is divided."""
    n = 4 * model.parameters
    for each in model.contestants[:4]:
        assert 0 <= (each.communication_share or 0.0) < 1
        for kind in ("parameters", "gradients", "optimizer"):
            assert each.memory[kind].measured_bytes == pytest.approx(each.memory[kind].predicted_bytes, rel=1e-3)
        assert each.memory["activations"].measured_bytes >= each.memory["activations"].predicted_bytes > 0
        assert each.memory["optimizer"].measured_bytes == pytest.approx(2 * n / ranks, rel=1e-2)
    assert model.contestants[4].memory == {}


@pytest.mark.slow
def test_beside_pytorch(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    report, printed = measured(tmp_path, 2, "--peers")
    assert report.notes == []
    names = [each.name for each in report.models[0].contestants]
    assert names == [*OURS, "DDP, gloo", "mpitrain.torch", "PyTorch, serial runs"]
    assert all("DDP, gloo" in each.ratios for each in report.models[0].contestants if each.name != "DDP, gloo")
    assert "to DDP, gloo" in printed


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--models=mlp256,rnn", "no 'rnn'; expected some of mlp256, mlp1024, mlp2048, cnn, gpt"),
        ("--json=nowhere/figures.json", "'nowhere' is no folder that can be written to; make it first"),
        ("--plot=nowhere/figure.png", "'nowhere' is no folder that can be written to; make it first"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(option: str, words: str) -> None:
    done = CliRunner().invoke(command, ["training", option])
    assert done.exit_code == 2
    assert words in done.output


@pytest.mark.parametrize("n", [["-n", "2"], ["-n2"], ["--ranks", "2"], ["--ranks=2"]])
def test_ranks_are_started_with_the_rest_of_the_line(n: list[str]) -> None:
    assert _without_ranks(["bench", "training", *n, "--peers"]) == ["bench", "training", "--peers"]


def test_calls_within_calls_count_once() -> None:
    def event(name: str, category: str, row: int, start: float, length: float, rank: int = 0) -> dict[str, object]:
        return {"ph": "X", "name": name, "cat": category, "tid": row, "pid": rank, "ts": start, "dur": length}

    events = [
        event("step", "phase", 0, 0, 100), event("allreduce", "comm", 1, 10, 20), event("reduce", "comm", 1, 12, 5),
        event("step", "phase", 0, 0, 100, rank=1), event("allreduce", "comm", 1, 10, 40, rank=1),
        event("gradients", "phase", 0, 0, 5), {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    assert share_of(events) == (20 + 40) / 200
    assert share_of([]) == 0.0


def test_memory_that_overlaps_counts_once() -> None:
    whole = np.zeros(10, np.float32)
    assert held_bytes([whole, whole[2:4], np.zeros(3), whole[5:]]) == 40 + 24
    assert held_bytes([]) == 0


def timed(name: str, seconds: float, others: dict[str, float], memory: dict[str, Memory] | None = None) -> Contestant:
    ratios = {each: Quantiles.of(np.full(3, theirs / seconds)) for each, theirs in others.items()}
    return Contestant(name, Quantiles.of(np.full(3, seconds)), 100 / seconds, 0.5, ratios, 0.1, memory or {})


REPORT = TrainingReport(
    ["mpitrain"],
    {"ranks": 2, "transport": "shared", "mpi_library": "Open MPI v5, more", "machine": {"cpu": "CPU"},
     "versions": {"numpy": "2"}, "compiled_adam": True},
    1e9,
    [Trained("a", "A model", "samples", 50, 1234, 10**7, [
        timed("data", 0.02, {"DDP, gloo": 0.03}, dict.fromkeys(training_tables.KINDS, Memory(2e6, 1e6))),
        replace(timed("DDP, gloo", 0.03, {"data": 0.02}), communication_share=None),
    ])],
    ["a note"],
)  # fmt: skip


def test_the_rows_of_the_tables() -> None:
    (model,) = REPORT.models
    heads = ("", "ms a step", "p10–p90", "samples/s", "of products", "communicating", "to data", "to DDP, gloo")
    assert training_tables.columns(model) == heads
    assert training_tables.rows(model) == [
        ("data", "20.00", "20.00–20.00", "5,000", "50%", "10%", "", "1.50"),
        ("DDP, gloo", "30.00", "30.00–30.00", "3,333", "50%", "", "0.67", ""),
    ]
    assert training_tables.memory_rows(model) == [("data", *["2.00 (1.00)"] * 4)]


def test_all_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    training_tables.show(REPORT, Console(width=150))
    printed = capsys.readouterr().out
    assert "2 ranks, Open MPI v5, shared, CPU" in printed
    assert "products at 1 GFLOP/s each, compiled Adam" in printed
    assert "a note" in printed
    assert "1,234 parameters, 50 samples a rank, 0.01 GFLOP a rank and step (10.0 ms of products)" in printed


def test_the_figure(tmp_path: Path) -> None:
    training_plot.draw(REPORT, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    (axes,) = training_plot.figure(REPORT).axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([5000, 3333.33], rel=1e-4)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["data", "DDP, gloo"]
