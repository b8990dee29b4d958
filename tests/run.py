"""The whole suite: unit tests in this process's child, then the MPI tests under a real ``mpiexec`` on n ranks each.

    python tests/run.py [--ranks 1 2 3 4] [--slow] [--timeout SECONDS] [pytest arguments]

Every launch has a hard time limit.  Each rank's output stays in ``.test-output/n<N>/rank-<r>.log``.  The last line is
the total over all launches; an MPI test counts once per launch, as failed if any rank failed it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from processes import run_limited

from mpitrain.comm.launch import launch_command

ROOT = Path(__file__).resolve().parent.parent
TEST_TIMEOUT_S = 60
TAIL_LINES = 60
MOST_WORKERS = 4
NOTHING_COLLECTED = 5


def main() -> int:
    options, pytest_arguments = _parser().parse_known_args()
    os.chdir(ROOT)
    output = options.output
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    only = "" if options.slow else " and not slow"
    totals = _unit(output / "unit.xml", ["-m", f"not mpi{only}", *pytest_arguments], options.timeout)
    mpi_tests: Counter[str] = Counter()
    for ranks in options.ranks:
        mpi_tests += _under_mpi(ranks, output / f"n{ranks}", ["-m", f"mpi{only}", *pytest_arguments], options.timeout)
    totals += mpi_tests
    if options.ranks and not mpi_tests.total():
        print("error: no MPI test ran")
    print(f"{totals['passed']} passed, {totals['failed']} failed, {totals['skipped']} skipped")
    return int(totals["failed"] > 0 or not mpi_tests.total())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4], help="sizes of the MPI launches")
    parser.add_argument("--slow", action="store_true", help="the slow tests too")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each launch")
    parser.add_argument("--output", type=Path, default=ROOT / ".test-output", help="folder; emptied first")
    return parser


def _unit(report: Path, arguments: list[str], timeout_s: float) -> Counter[str]:
    print("== unit tests", flush=True)
    workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS)  # tests start launches of up to 4 ranks themselves
    split = [f"--numprocesses={workers}", "--dist=worksteal"]
    argv = [sys.executable, "-m", "pytest", f"--junitxml={report}", *split, *arguments]
    code = run_limited(argv, dict(os.environ), timeout_s)
    return _verdict("the unit tests", code, [report])


def _under_mpi(ranks: int, folder: Path, arguments: list[str], timeout_s: float) -> Counter[str]:
    folder.mkdir()
    print(f"== MPI tests on {ranks} ranks", flush=True)
    fixed = ["--with-mpi", "-p", "no:cacheprovider", f"--timeout={TEST_TIMEOUT_S}", "--timeout-method=thread"]
    argv, env = launch_command(ranks, [sys.executable, "tests/rank.py", str(folder), *fixed, *arguments])
    env["MPITRAIN_TEST_RANKS"] = str(ranks)
    with (folder / "launcher.log").open("wb") as log:
        code = run_limited(argv, env, timeout_s, log)
    counts = _verdict(f"{ranks} ranks", code, [folder / f"rank-{rank}.xml" for rank in range(ranks)])
    if counts["failed"]:
        _print_tails(folder)
    print(f"   {dict(counts)}", flush=True)
    return counts


def _verdict(what: str, code: int | None, reports: list[Path]) -> Counter[str]:
    """Count tests by outcome.  A launch that ended badly without a failed test is itself one failure."""
    counts = _merge([_outcomes(report) for report in reports])
    missing = [report.name for report in reports if not report.exists()]
    if code is None:
        print(f"error: {what}: killed at the time limit")
    elif code not in (0, 1, NOTHING_COLLECTED) or missing:
        print(
            f"error: {what}: exit code {code}, no report from {missing}"
            if missing
            else f"error: {what}: exit code {code}"
        )
    badly = code not in (0, NOTHING_COLLECTED) or missing
    if badly and not counts["failed"]:
        counts["failed"] = 1
    return counts


def _outcomes(report: Path) -> dict[str, str]:
    """Return the outcome of each test in a JUnit file."""
    if not report.exists():
        return {}
    found: dict[str, str] = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        name = f"{case.get('classname')}::{case.get('name')}"
        if found.get(name) != "failed":  # a test that passed may be listed again for an error in its teardown
            found[name] = outcome
    return found


def _merge(ranks: list[dict[str, str]]) -> Counter[str]:
    """Count each test once: failed if it failed on any rank, else as on rank 0."""
    counts: Counter[str] = Counter()
    for name in {name for rank in ranks for name in rank}:
        seen = [rank[name] for rank in ranks if name in rank]
        counts["failed" if "failed" in seen else seen[0]] += 1
    return counts


def _print_tails(folder: Path) -> None:
    for log in sorted(folder.glob("*.log")):
        print(f"---- {log}")
        print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]))


if __name__ == "__main__":
    sys.exit(main())
