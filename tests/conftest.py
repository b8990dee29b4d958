"""What all tests share: the world of an MPI launch, a way to start launches, and an end for tests that hang."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from processes import run_limited

import mpitrain.comm
from mpitrain.comm.launch import launch_command

_RANKS = int(os.environ.get("MPITRAIN_TEST_RANKS", "0"))
_PATIENCE_S = 5.0
_FAILED = pytest.StashKey[bool]()
_CONTROL = pytest.StashKey[mpitrain.comm.Communicator]()
_BROKEN = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    """Start MPI before anything else does, and refuse a world of another size than was asked for."""
    if not _RANKS:
        hypothesis.settings.register_profile(
            "unit", deadline=None
        )  # each test has an end, and a busy machine is no bug
        hypothesis.settings.load_profile("unit")
        return
    world = mpitrain.comm.world()
    if world.size != _RANKS:
        pytest.exit(f"asked for {_RANKS} ranks, but the world has {world.size}", returncode=3)
    control = world.split(0)
    assert control is not None
    config.stash[_CONTROL] = control
    hypothesis.settings.register_profile("mpi", database=None, derandomize=True, deadline=None)
    hypothesis.settings.load_profile("mpi")  # the same examples on all ranks


def _may_hold_mpi_tests(path: Path) -> bool:
    text = path.read_text()
    return "mark.mpi" in text or "on_ranks" in text


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Under a launch, pass over files without MPI tests: importing all of them on all ranks takes longer than most."""
    passed_over = _RANKS and collection_path.suffix == ".py" and not _may_hold_mpi_tests(collection_path)
    return True if passed_over else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Complain of an MPI test in a file that launches pass over."""
    for path in {item.path for item in items if item.get_closest_marker("mpi")}:
        if not _may_hold_mpi_tests(path):
            raise pytest.UsageError(f"{path}: holds MPI tests, but names neither mark.mpi nor on_ranks")


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over the thousands of tests and modules that are there by now."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    if _RANKS:
        _leave_together(item)
    return outcome


def _leave_together(item: pytest.Item) -> None:
    """Wait for the other ranks to end the test too; if this rank failed it, they may never."""
    together = item.config.stash[_CONTROL].ibarrier()
    deadline = time.monotonic() + _PATIENCE_S if item.stash.get(_FAILED, False) else float("inf")
    while not together.test():
        if time.monotonic() > deadline:
            item.config.stash[_BROKEN] = True
            pytest.exit(f"{item.nodeid} failed on this rank and not, or not yet, on others", returncode=1)
        time.sleep(1e-3)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    ordinary = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    if exitstatus not in ordinary:
        session.config.stash[_BROKEN] = True


def pytest_unconfigure(config: pytest.Config) -> None:
    """End all ranks if this one leaves early; its report is written by now."""
    control = config.stash.get(_CONTROL, None)
    if control is None:
        return
    if config.stash.get(_BROKEN, False):
        sys.stdout.flush()
        control.abort(1)
    control.barrier()


@pytest.fixture
def world() -> mpitrain.comm.Communicator:
    """The world's communicator, in tests marked ``mpi``."""
    return mpitrain.comm.world()


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., tuple[int | None, str]]:
    """Run a script under mpiexec; returns (exit code, or None if it was killed, and its output)."""

    def run(
        ranks: int, source: str, *arguments: str, timeout_s: float = 60.0, **variables: str
    ) -> tuple[int | None, str]:
        script = tmp_path / "script.py"
        script.write_text(source)
        argv, env = launch_command(ranks, [sys.executable, str(script), *arguments])
        log = tmp_path / "output.log"
        with log.open("wb") as output:
            code = run_limited(argv, env | variables, timeout_s, output)
        return code, log.read_text(errors="replace")

    return run
