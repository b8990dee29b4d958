"""``tests/run.py`` itself: it fails, with an exit code and a total, whatever way a suite can go wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
HEAD = "import os, time, pytest\npytestmark = pytest.mark.mpi\n"
GOOD = "def test_good(world): assert world.allreduce(1) == world.size\n"


def run_suite(folder: Path, source: str, *options: str, **variables: str) -> tuple[int, list[str]]:
    """Run the suite on a file of its own; returns the exit code and the lines printed."""
    suite = folder / "test_suite.py"
    suite.write_text(source)
    command = [sys.executable, str(TESTS / "run.py"), "--output", str(folder / "output"), *options]
    pytest_options = ["-c", str(TESTS.parent / "pyproject.toml"), "-p", "conftest", str(suite)]
    env = os.environ | {"PYTHONPATH": str(TESTS)} | variables
    done = subprocess.run(
        [*command, *pytest_options], env=env, capture_output=True, text=True, timeout=100, check=False
    )  # fmt: skip
    return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.mark.parametrize(
    ("body", "total", "words"),
    [
        ("", "2 passed, 0 failed, 0 skipped", ""),
        ("def test_bad(world): assert world.rank == 0\n", "3 passed, 1 failed, 0 skipped", "assert 1 == 0"),
        # Failing on one rank leaves the other in a collective; its report is written before the job is aborted.
        (
            "def test_lonely(world):\n    assert world.rank == 0\n    world.barrier()\n",
            "3 passed, 1 failed, 0 skipped",
            "failed on this rank",
        ),
        (
            "@pytest.mark.timeout(2)\ndef test_stuck(world):\n    if world.rank: world.recv(0.0, 0)\n",
            "2 passed, 1 failed, 0 skipped",
            "Timeout",
        ),
        ("def test_exits(world):\n    if world.rank: os._exit(0)\n", "2 passed, 1 failed, 0 skipped", ""),
        ("def test_skipped(world): pytest.skip('why')\n", "2 passed, 0 failed, 2 skipped", ""),
    ],
    ids=["good", "bad", "lonely", "stuck", "exits", "skipped"],
)
@pytest.mark.slow
def test_outcomes(tmp_path: Path, body: str, total: str, words: str) -> None:
    code, lines = run_suite(tmp_path, HEAD + GOOD + body, "--ranks", "1", "2", "--timeout", "20")
    print("\n".join(lines))
    assert lines[-1] == total
    assert code == ("0 failed" not in total)
    assert words in "\n".join(lines)
    assert (tmp_path / "output/n2/rank-1.log").stat().st_size > 0


@pytest.mark.slow
def test_a_suite_without_mpi_tests_fails(tmp_path: Path) -> None:
    code, lines = run_suite(tmp_path, "def test_unit(): pass\n", "--ranks", "2")
    assert (code, lines[-1]) == (1, "1 passed, 0 failed, 0 skipped")
    assert "error: no MPI test ran" in lines


@pytest.mark.slow
def test_a_suite_of_singletons_fails(tmp_path: Path) -> None:
    suite = tmp_path / "test_suite.py"
    suite.write_text(HEAD + GOOD)
    options = ["-c", str(TESTS.parent / "pyproject.toml"), "-p", "conftest", "--with-mpi", "-m", "mpi", str(suite)]
    env = os.environ | {"PYTHONPATH": str(TESTS), "MPITRAIN_TEST_RANKS": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert "asked for 2 ranks, but the world has 1" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_launch_that_hangs_is_killed(tmp_path: Path) -> None:
    source = HEAD + "def test_hangs(world): time.sleep(600)\n"
    code, lines = run_suite(tmp_path, source, "--ranks", "2", "--timeout", "15")
    assert (code, lines[-1]) == (1, "0 passed, 1 failed, 0 skipped")
    assert "error: 2 ranks: killed at the time limit" in lines
