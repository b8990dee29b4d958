"""Failures on one rank: agreed on in a block, or the end of the whole job."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from mpitrain._errors import DataError, LaunchError, MpitrainError, PeerError
from mpitrain.comm import Communicator, LocalWorld, agree, guard

Launch = Callable[..., tuple[int | None, str]]


def test_agree_lets_all_ranks_leave_with_the_reason() -> None:
    def program(comm: Communicator) -> tuple[type, str, int]:
        try:
            with agree(comm):
                if comm.rank in (1, 2):
                    raise DataError("labels out of range")
        except MpitrainError as error:
            return type(error), str(error), error.exit_code
        raise AssertionError("all ranks must leave by an error")

    peer = (
        PeerError,
        "failed on rank 1, 2; rank 1: mpitrain._errors.DataError: labels out of range; "
        "rank 2: mpitrain._errors.DataError: labels out of range",
        2,
    )
    own = (DataError, "labels out of range", 2)
    assert LocalWorld(4).run(program) == [peer, own, own, peer]


def test_agree_passes_when_all_succeed_and_keeps_exit_code_1_for_bugs() -> None:
    def program(comm: Communicator) -> tuple[str, int]:
        with agree(comm):
            pass
        try:
            with agree(comm):
                if comm.rank == 1:
                    raise KeyError("a bug\nof two lines")
        except PeerError as error:
            return str(error), error.exit_code
        except KeyError as error:
            return str(error), guard.exit_code(error)
        raise AssertionError("all ranks must leave by an error")

    peer, own = LocalWorld(2).run(program)
    assert peer == (r"failed on rank 1; rank 1: KeyError: 'a bug\nof two lines'", 1)
    assert own == (r"'a bug\nof two lines'", 1)


RAISE = """
import sys, threading
from mpitrain._errors import JobError
from mpitrain.comm import abort_on_uncaught, world
comm = world()
{install}
if comm.rank == comm.size - 1:
    def failing_function():
        raise {error}
    {start}
comm.barrier()
if comm.rank < comm.size - 1: comm.recv(0.0, comm.size - 1)
"""
IN_THREAD = "thread = threading.Thread(target=failing_function); thread.start(); thread.join()"


@pytest.mark.parametrize("start", ["failing_function()", IN_THREAD], ids=["main", "thread"])
def test_an_uncaught_exception_ends_the_job_with_its_traceback(launch: Launch, start: str) -> None:
    """In a script that asks for nothing: `world` sees to it."""
    begin = time.monotonic()
    code, output = launch(3, RAISE.format(error="ValueError('a bug')", start=start, install=""))
    assert time.monotonic() - begin < 20
    assert code == 1
    assert "[rank 2 of 3] Traceback" in output
    assert "in failing_function" in output
    assert "[rank 2 of 3] ValueError: a bug" in output
    assert "[rank 0 of 3]" not in output


def test_a_users_error_is_one_line_and_exit_code_2(launch: Launch) -> None:
    for ranks in (1, 2):
        install = "abort_on_uncaught(comm)"
        script = RAISE.format(error="JobError('no such key')", start="failing_function()", install=install)
        code, output = launch(ranks, script)
        assert code == 2
        assert f"[rank {ranks - 1} of {ranks}] error: no such key" in output
        assert "Traceback" not in output


MISMATCH = """
import numpy as np
from mpitrain.comm import world
comm = world()
comm.allreduce(np.ones(3 + comm.rank))
"""

GIVES_MORE = """
import numpy as np
from mpitrain.comm import world
comm = world()
comm.allgather(np.ones(3 + comm.rank))
"""

UNPICKLED = """
from mpitrain.comm import world
comm = world()
comm.allgather_object(lambda: 0)
"""


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            MISMATCH,
            "allreduce: ranks reduce different arrays; got rank 0 of the node: 3 elements; rank 1",
        ),
        pytest.param(GIVES_MORE, "sent more than this one awaits", marks=pytest.mark.slow),
        pytest.param(UNPICKLED, "the object cannot be pickled; got", marks=pytest.mark.slow),
    ],
)
def test_what_ranks_do_wrong_is_one_line_with_the_line_of_the_program(launch: Launch, script: str, words: str) -> None:
    code, output = launch(2, script)
    told = [line for line in output.splitlines() if words in line]
    site = f"script.py:{script.count(chr(10))}"
    assert code in (1, 2), output
    assert told, output
    assert all(" error: " in line and line.endswith(site) for line in told), output
    assert "Traceback" not in output


@pytest.mark.parametrize("variable", [None, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_world_of_one_where_several_were_launched_is_refused(variable: str | None) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI", "SLURM_"))}
    env |= {variable: "4"} if variable else {}
    command = [sys.executable, "-c", "from mpitrain.comm import world; print(world().size)"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    if variable is None:
        assert (done.returncode, done.stdout) == (0, "1\n")
        return
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    for words in ("LaunchError", f"{variable}=4", "expected 4 ranks", "mpiexec", "--mpi=pmix"):
        assert words in last


def test_check_launch_lets_whole_worlds_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    guard.check_launch(4)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    guard.check_launch(1)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(LaunchError):
        guard.check_launch(1)
