"""The cases of `pairwise_cases.py`: that they have every pair, and what becomes of them among threads and processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from pairwise import Case, Rules, cover
from pairwise_cases import (
    AXES,
    WORLDS,
    Place,
    cases_of,
    meant_pairs,
    pairs,
    places,
    run_case,
    run_case_at,
    run_cases,
)
from virtual_nodes import ROOT, VirtualNodes, missing

from mpitrain.comm import LocalWorld

HERE = WORLDS[0]


def _values(cases: list[Case]) -> set[Any]:
    return {pair for case in cases for pair in combinations(case.items(), 2)}


def test_the_generator_covers_a_small_product() -> None:
    axes = {"a": [1, 2, 3], "b": [1, 2, 3, 4], "c": [0, 1], "d": [0, 1, 2]}
    rules: Rules = [("a", "b", lambda a, b: a != b), ("b", "d", lambda b, d: b != 4 or d == 2)]
    whole = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    meant = [case for case in whole if case["a"] != case["b"] and (case["b"] != 4 or case["d"] == 2)]
    found = [{axis: case[axis] for axis in axes} for case in cover(axes, rules)]
    assert _values(found) == _values(meant)
    assert all(case in meant for case in found)
    assert len(found) <= 15  # a product of the two longest axes has 12


@pytest.mark.parametrize("layouts", WORLDS)
def test_every_pair_that_has_a_meaning_occurs_in_each_job(layouts: tuple[str, ...]) -> None:
    covered, meant = pairs(cases_of(layouts)), meant_pairs(layouts)
    assert len(meant) > 0.95 * len(covered)
    assert meant <= covered


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("operation", AXES["operation"])
def test_threads(operation: str, size: int) -> None:
    LocalWorld(size, ranks_per_node=2).run(
        lambda comm: run_cases(cases_of(HERE, operation), lambda case: run_case(comm, case))
    )


@pytest.fixture(scope="module")
def at() -> Iterator[Callable[[Case], Place]]:
    """The place of a case."""
    with places(HERE) as found:
        yield found


@pytest.mark.mpi
def test_the_transports_and_nodes_are_those_that_are_meant(at: Callable[[Case], Place]) -> None:
    found = {
        (layout, transport): at({"layout": layout, "transport": transport}).comm
        for layout, transport in product(HERE, AXES["transport"])
    }
    size, rank = found["one node", "host"].size, found["one node", "host"].rank
    chosen = "host" if size == 1 else "shared"
    assert {place: comm.transport for place, comm in found.items()} == {
        ("one node", "host"): "host",
        ("one node", "shared"): chosen,
        ("one node", "network"): "host" if size == 1 else "network",
        ("parts of 2", "host"): "host",
        ("parts of 2", "shared"): "host" if size == 3 else chosen,  # three make nodes of unequal size
        ("parts of 2", "network"): "host" if size == 1 else "network",
        ("parts of 1", "host"): "host",
        ("parts of 1", "shared"): "host" if size == 1 else "network",  # no case: what is chosen where ranks are alone
        ("parts of 1", "network"): "host" if size == 1 else "network",
    }
    nodes = {"one node": size, "parts of 2": min(2, size - rank // 2 * 2), "parts of 1": 1}
    assert {place: comm.node.size for place, comm in found.items()} == {place: nodes[place[0]] for place in found}


@pytest.mark.mpi
@pytest.mark.parametrize("operation", AXES["operation"])
def test_processes(at: Callable[[Case], Place], operation: str) -> None:
    run_cases(cases_of(HERE, operation), lambda case: run_case_at(at(case), case))


@pytest.mark.skipif(bool(missing()), reason=f"no virtual nodes: {missing()}")
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_virtual_nodes(ranks_per_node: int, tmp_path: Path) -> None:
    """Only what the ranks have seen where they say they were counts as covered."""
    layout, report = f"virtual 2 × {ranks_per_node}", tmp_path / "cases.json"
    script = Path(__file__).with_name("pairwise_ranks.py")
    with VirtualNodes(2) as nodes, (tmp_path / "log").open("wb") as log:
        code = nodes.run(ranks_per_node, [sys.executable, str(script), str(report)], 60, log, PYTHONPATH=str(ROOT))
    assert code == 0, (tmp_path / "log").read_text()
    ran = json.loads(report.read_text())
    assert meant_pairs([layout]) <= pairs(ran)
