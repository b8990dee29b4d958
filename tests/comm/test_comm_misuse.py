"""What a communicator says when it is misused: named within seconds by the living ranks or the launcher, never a hang.

The programs are those of `misuse`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from misuse import FATAL, SURVIVORS

Launch = Callable[..., tuple[int | None, str]]

SOURCE = Path(__file__).with_name("misuse.py").read_text()
NAMED_S = 5.0
ENDED_S = 4.0  # more, for the launcher to end the ranks
_told: dict[int, dict[tuple[str, int], dict[str, Any]]] = {}


@pytest.fixture(params=[pytest.param(2, marks=pytest.mark.slow), 3])
def told(request: pytest.FixtureRequest, launch: Launch) -> dict[tuple[str, int], dict[str, Any]]:
    """What each rank was told in each case that ranks survive, from one launch for all of them."""
    ranks = request.param
    if ranks not in _told:
        code, output = launch(ranks, SOURCE, "survivors", MPITRAIN_DEBUG="1")
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        assert code == 0, output
        _told[ranks] = {(line["case"], line["rank"]): line for line in lines}
    return _told[ranks]


@pytest.mark.parametrize("name", SURVIVORS)
def test_debug_mode_names(name: str, told: dict[tuple[str, int], dict[str, Any]]) -> None:
    size = 1 + max(rank for _, rank in told)
    concerned = {
        "all": range(size), "others": range(size - 1), "odd": [size - 1], "pair": [0, size - 1], "first": [0],
    }[SURVIVORS[name].told]  # fmt: skip
    for rank in concerned:
        line = told[name, rank]
        assert line["seconds"] < NAMED_S
        assert [word for word in SURVIVORS[name].words if word not in line["told"]] == [], line["told"]
        if "\n" in line["told"]:
            listed = re.findall(r"^  rank (\d+): ", line["told"], re.M)
            assert listed == sorted(set(listed))
            assert str(rank) in listed


IN_DEBUG_MODE = {
    "raises": ["KeyError: 'a bug'"],
    "exits with 0": ["rank {odd} has left", "#3 barrier()", "has exited"],
    "exits with 1": ["rank {odd} has left", "#3 barrier()", "has exited"],
    "leaves with 0": ["process rank {odd}", "exiting"],
    "leaves with 1": ["1,{odd}]", "Exit code:    1"],
    "is killed": ["process rank {odd}", "signal 9"],
    "crashes": ["process rank {odd}", "signal 11"],
    "is stopped": ["rank {odd} has not come within 2 s", "#3 barrier()", "is stopped"],
    "is stopped inside": ["barrier() has waited for 2", "rank {odd}: is stopped"],
    "loops": ["rank {odd} has not come within 2 s", "outside of communicators, at", "its last call: barrier()"],
    "finalises": ["rank {odd} has left", "#3 barrier()", "has exited"],
    "is not in debug mode": ["rank {odd}", "in barrier() at", "2 s"],
    "calls another": ["ranks called different collectives", "#3 barrier()", "#3 allgather(float64[6])"],
}
"""What is printed; by the launcher for a process that is gone."""

ENDED = ["rank {odd} has come to the end of the program", "rank 0: in barrier() at", "rank {odd}: has exited"]

PLAIN = {
    "raises": ["KeyError: 'a bug'"],
    "exits with 0": ENDED,
    "exits with 1": ENDED,
    "leaves with 0": ["process rank {odd}", "exiting"],
    "leaves with 1": ["1,{odd}]", "Exit code:    1"],
    "is killed": ["process rank {odd}", "signal 9"],
    "crashes": ["process rank {odd}", "signal 11"],
    "is stopped": ["barrier() has waited for 2", "rank {odd}: is stopped"],
    "is stopped inside": ["barrier() has waited for 2", "rank {odd}: is stopped"],
    "loops": ["barrier() has waited for 2", "rank {odd}: outside of communicators, at", "in loop"],
    "finalises": ENDED,
    "calls another": [" has waited for 2", ": in barrier() at", "rank {odd}: in allgather(float64[6]) at"],
}
"""Without debug mode, the watchdog waits first; but for ranks that have ended, which say so."""

QUICK = ("exits with 0", "is stopped inside", "loops", "is not in debug mode")


def _slow_unless(quick: tuple[str, ...], names: dict[str, list[str]]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", _slow_unless(QUICK, IN_DEBUG_MODE))
def test_debug_mode_ends_the_job_when_a_rank(name: str, ranks: int, launch: Launch) -> None:
    _ends(launch, name, ranks, IN_DEBUG_MODE[name], MPITRAIN_DEBUG="1")


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", _slow_unless(("exits with 0", "is stopped inside", "loops"), PLAIN))
def test_the_watchdog_ends_the_job_when_a_rank(name: str, ranks: int, launch: Launch) -> None:
    _ends(launch, name, ranks, PLAIN[name])


def _ends(launch: Launch, name: str, ranks: int, words: list[str], **variables: str) -> None:
    code, output = launch(ranks, SOURCE, name, timeout_s=30.0, **variables)
    seconds = time.time() - float(re.findall(r"begun (\S+)", output)[0])
    assert code not in (None, 0), output
    assert [word for word in words if word.format(odd=ranks - 1) not in output] == [], output
    assert seconds < NAMED_S + ENDED_S


def test_every_program_is_tested() -> None:
    assert set(IN_DEBUG_MODE) == set(FATAL)
    assert len(SURVIVORS) + len(FATAL) >= 30
