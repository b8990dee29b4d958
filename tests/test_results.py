"""The pages of results: that their figures are those of the files beside them, and what goals make of figures."""

from __future__ import annotations

import collectives
import gpu_figures
import numpy as np
import training
from collectives_tables import Row, goals, left_to_the_library, rows, table

from mpitrain.comm.bench.results import Launch, Measurement, Quantiles, Report, Rivalry

SIZES = (4, 2**18, 2**22, 2**24)


def row(variant: str, size: int, default: float, transport: str = "shared", **changes: object) -> Row:
    made = Row(
        "allreduce", variant, transport, size, 10.0, 10.0 * (1 - default), default, default / 2, "sm", 4 * default
    )
    return made._replace(**changes)


def test_the_page_of_the_collectives_shows_what_was_measured() -> None:
    head, _, shown = collectives.PAGE.read_text().partition(collectives.MARKER)
    assert head.startswith("# ")
    assert shown.strip() == collectives.page().strip(), "run python tests/collectives.py page"
    assert shown.count("## ") == len(list(collectives.FOLDER.rglob("*.json")))


def test_the_page_of_training_steps_shows_what_was_measured() -> None:
    head, _, shown = training.PAGE.read_text().partition(training.MARKER)
    assert head.startswith("# ")
    assert shown.strip() == training.page().strip(), "run python tests/training.py page"
    assert shown.count("## All models: ") == len(list(training.FOLDER.glob("*.json"))) > 0


def test_the_page_of_gpus_shows_what_was_measured() -> None:
    head, _, shown = gpu_figures.PAGE.read_text().partition(gpu_figures.MARKER)
    assert head.startswith("# ")
    assert shown.strip() == gpu_figures.page().strip(), "run python tests/gpu_figures.py page"
    assert shown.count("## ") == len(list(gpu_figures.FOLDER.glob("*.json"))) > 0


def test_rows_have_the_best_of_all_rivals() -> None:
    def measured(ours_s: float, **rivals_s: float) -> Measurement:
        each = {name: Rivalry.of(np.full(3, s), np.full(3, ours_s)) for name, s in rivals_s.items()}
        return Measurement("allreduce", "plan", "shared", 4, 4, Quantiles.of(np.full(3, ours_s)), each)

    launches = [
        Launch("default", 1, {}, [], [measured(2e-6, mpi4py=6e-6, gloo=8e-6)]),
        Launch("sm", 1, {}, [], [measured(5e-6, mpi4py=7e-6)]),
    ]
    (found,) = rows(Report([], launches, []))
    assert found[:4] == ("allreduce", "plan", "shared", 4)
    assert [round(each, 6) for each in found[4:8]] == [2.0, -4.0, 3.0, 1.4]
    assert (found.best_name, round(found.gloo, 6)) == ("sm", 4.0)


def test_tables() -> None:
    found = [
        row("plan", 2**18, 4.0), row("plan", 4, 0.5, gloo=None), row("plan", 2**22, 9.0),
        row("plan", 4, 0.5, "host"), row("checked", 2**20, 1.0, "host", operation="broadcast"),
    ]  # fmt: skip
    assert table(found)[2:] == [
        "| plan (shared) | 4 | 10 | +5 | 0.5 | 0.25 (sm) |  |",
        "|  | 256K | 10 | -30 | 4 | 2 (sm) | 16 |",
        "|  | 4M | 10 | -80 | 9 | 4.5 (sm) | 36 |",
        "|  | mean from 256K on |  |  | **6** | **3** | **24** |",
    ]
    assert left_to_the_library(found) == [
        "| ours by the default's time | 4 | 1M |",
        "| --- | --- | --- |",
        "| plan (host) | 2 |  |",
        "| broadcast, checked (host) |  | 1 |",
    ]


def cells(lines: list[str]) -> dict[str, tuple[str, str]]:
    found = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in lines if line.startswith("| ")]
    return {goal: (words, met) for goal, words, met in found[2:]}


def test_goals_of_two_ranks() -> None:
    found = [
        *(row("plan", size, 6.0) for size in SIZES),
        *(row("plan in place", size, 3.0) for size in SIZES[1:]),
        row("checked", 4, 0.4, behind_us=5.5), row("checked", 2**18, 1.2), row("checked", 2**22, 1.5),
        row("plan", 4, 0.95, "host", behind_us=0.4), row("plan in place", 2**22, 0.97, "host"),
    ]  # fmt: skip
    verdicts = cells(goals(found, 2))
    assert verdicts == {
        "`comm.empty`: 3 × the best, mean": ("plan (shared): 3, plan in place (shared): 1.5 **missed**", "no"),
        "1.8 × the best at each size": ("plan (shared): 3, plan in place (shared): 1.5 **missed**", "no"),
        "4 × the default, mean": ("plan (shared): 6, plan in place (shared): 3 **missed**", "no"),
        "15 × gloo up to 4M": ("plan (shared): 24, plan in place (shared): 12 **missed**", "no"),
        "5 × gloo above 4M": ("plan (shared): 24, plan in place (shared): 12", "yes"),
        "ordinary arrays: 1.5 × the default from 1M on": ("checked (shared): 1.5", "yes"),
        "checked, 4 bytes: 5 µs more at most": ("checked (shared): 5.5 **missed**", "no"),
        "planned, 4 bytes: 1 µs": ("plan (shared): -50, plan (host): 0.4", "yes"),
        "everywhere else at most 1.05 × the default's time": ("3 of 5", "no"),
    }
    assert goals(found, 2)[-1] == "Above 1.05 × the default's time: checked (shared) 4 2.5; plan (host) 4 1.05."


def test_more_ranks_need_be_no_slower_anywhere() -> None:
    found = [row("plan", 2**22, 0.5), row("checked", 2**22, 0.96)]
    assert cells(goals(found, 4)) == {"everywhere else at most 1.05 × the default's time": ("1 of 2", "no")}
    assert cells(goals(found[1:], 4)) == {"everywhere else at most 1.05 × the default's time": ("1 of 1", "yes")}
