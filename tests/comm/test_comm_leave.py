"""How a program ends when some ranks fail, or all."""

from __future__ import annotations

from collections.abc import Callable

Launch = Callable[..., tuple[int | None, str]]

PROGRAM = """
from mpitrain._errors import DataError
from mpitrain.comm import agree, leave_together, world
comm = world()
with leave_together(comm, patience_s=1.0):
    with agree(comm):
        if comm.rank in {agreed}:
            raise DataError("NaN in column 3")
    if comm.rank in {alone}:
        raise DataError("file is gone")
    comm.allreduce(1)
    print("well")
"""


def test_a_shared_failure_is_told_once(launch: Launch) -> None:
    code, output = launch(3, PROGRAM.format(agreed=(1,), alone=()))
    assert code == 2
    assert output.count("NaN in column 3") == 1
    assert "MPI_ABORT" not in output
    assert "well" not in output


def test_a_lonely_failure_aborts(launch: Launch) -> None:
    code, output = launch(3, PROGRAM.format(agreed=(), alone=(2,)))
    assert code == 2
    assert "[rank 2 of 3] error: file is gone" in output
    assert "well" not in output


def test_success_changes_nothing(launch: Launch) -> None:
    code, output = launch(2, PROGRAM.format(agreed=(), alone=()))
    assert (code, output.split()) == (0, ["well", "well"])
