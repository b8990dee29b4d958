"""Reduction by the levels of a wide node: the arithmetic, and simulated nodes of up to 128 ranks on threads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import shared_checks
from conformance import folded, same, values
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain.comm import Communicator, LocalWorld
from mpitrain.comm.local import LocalCommunicator
from mpitrain.comm.transports import shared
from mpitrain.comm.transports.choice import choose
from mpitrain.comm.transports.levels import Levels
from mpitrain.comm.transports.topology import domain

Domains = Sequence[tuple[int, ...] | None]


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(2, 4), min_size=1, max_size=3), elements=st.integers(0, 150))
def test_every_element_of_every_rank_is_combined_once(sizes: list[int], elements: int) -> None:
    levels = Levels(sizes)
    ranks = int(np.prod(sizes))
    held = [[{rank} for _ in range(elements)] for rank in range(ranks)]  # whose values each rank's partial sums hold
    for level in range(len(sizes)):
        after = [list(map(set, each)) for each in held]
        for rank in range(ranks):
            phase = levels.phases(rank, elements, 4)[level]
            for element in range(phase.begin, phase.end):
                parts = [held[source][element] for source in phase.sources]
                assert sum(map(len, parts)) == len(set().union(*parts)), "a value is counted twice"
                after[rank][element] = set().union(*parts)
        held = after
    owners = [levels.phases(rank, elements, 4)[-1] for rank in range(ranks)]
    assert sorted(e for phase in owners for e in range(phase.begin, phase.end)) == list(range(elements))
    for rank, phase in enumerate(owners):
        assert all(held[rank][element] == set(range(ranks)) for element in range(phase.begin, phase.end))


@pytest.mark.parametrize(
    ("domains", "sizes"),
    [
        ([(r // 64, r // 16) for r in range(128)], (16, 4, 2)),
        ([(r % 2, r % 2) for r in range(8)], (4, 2)),  # placed round robin
        ([(0, r // 2) for r in range(8)], (2, 4)),
        ([(0, 0)] * 4, (4,)),
        ([(0, 0), (0, 1)], (2,)),
        ([(0, 0), (0, 0), (1, 1)], (3,)),  # unequal
        ([(0, 0), None], (2,)),  # not bound
        ([(0,), (0, 1)], (2,)),
    ],
)
def test_levels_of_a_node(domains: Domains, sizes: tuple[int, ...]) -> None:
    levels = Levels.of(domains)
    assert levels.sizes == sizes
    for rank, own in enumerate(domains):
        if len(sizes) > 1:  # what is combined first lies in one domain
            assert {domains[source] for source in levels.phases(rank, 1000, 4)[0].sources} == {own}


def test_a_rank_reads_of_others_what_the_cost_model_says() -> None:
    nbytes, item_bytes = 1 << 20, 4

    def read(sizes: tuple[int, ...]) -> list[int]:
        phases = Levels(sizes).phases(77, nbytes // item_bytes, item_bytes)
        return [(len(phase.sources) - 1) * (phase.end - phase.begin) * item_bytes for phase in phases]

    assert read((16, 4, 2)) == [15 * nbytes // 16, 3 * nbytes // 64, nbytes // 128]  # the last: n(s - 1)/p
    assert sum(read((16, 4, 2))) == read((128,))[0] == 127 * nbytes // 128


def test_the_domain_of_a_process_is_read_from_sysfs(tmp_path: Path) -> None:
    for cpu in range(4):
        for name, text in {
            "topology/physical_package_id": f"{cpu // 2}\n",
            "cache/index2/shared_cpu_list": f"{cpu}\n",
            "cache/index3/shared_cpu_list": f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}\n",
        }.items():
            path = tmp_path / f"cpu{cpu}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    assert domain({2, 3}, tmp_path) == (1, 2)
    assert domain({0}, tmp_path) == (0, 0)
    assert domain({1, 2}, tmp_path) is None
    assert domain({7}, tmp_path) is None
    (tmp_path / "cpu9" / "topology").mkdir(parents=True)
    (tmp_path / "cpu9" / "topology" / "physical_package_id").write_text("0")
    assert domain({9}, tmp_path) == (0, 0)  # a machine that tells of no caches


@pytest.mark.parametrize(
    ("loops", "sizes"),
    [
        *product(("compiled", "numpy"), ((2, 2), (3, 2, 2))),
        *(pytest.param(loops, (16, 4, 2), marks=pytest.mark.slow) for loops in ("compiled", "numpy")),
    ],
    ids=str,
)
def test_simulated_nodes(loops: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    shared_checks.use_loops(loops, monkeypatch)
    shared_checks.cut_small(monkeypatch, streamed_from_bytes=1)
    monkeypatch.setattr(shared, "BY_LEVELS_FROM_BYTES", 1)
    monkeypatch.setattr(Levels, "of", lambda domains: Levels(sizes))
    monkeypatch.setattr(LocalCommunicator, "_choose_transport", lambda self: choose(self, lambda: lambda: None))
    ranks = int(np.prod(sizes))

    def body(comm: Communicator) -> None:
        for dtype, op, shape in [("float64", "sum", (7, 411)), ("float32", "mean", (5,)), ("float16", "sum", (300,))]:
            x = comm.empty(shape, dtype)
            x[...] = values(comm.rank, shape, dtype)
            plan = comm.allreduce_plan(x, op)
            same(plan(), folded(ranks, shape, dtype, op))
            same(plan(), folded(ranks, shape, dtype, op))  # the buffer was left alone
            comm.allreduce_plan(x, op, in_place=True)()
            same(x, folded(ranks, shape, dtype, op))

    LocalWorld(ranks, timeout_s=100).run(body)


def test_levels_are_used_in_the_test_above() -> None:
    phases = Levels((3, 2, 2)).phases(5, 7 * 411, 8)
    assert [len(phase.sources) for phase in phases] == [3, 2, 2]
    assert all(a.begin <= b.begin and b.end <= a.end for a, b in pairwise(phases))
