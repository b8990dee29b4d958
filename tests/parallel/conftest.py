"""Every check here takes a communicator, and runs on threads of 1 to 4 ranks and, under ``mpiexec``, on the world."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mpitrain.comm import Communicator, LocalWorld

PATIENCE_S = 20.0

Check = Callable[..., Any]


@pytest.fixture(params=[1, 2, 3, 4, pytest.param("mpi", marks=pytest.mark.mpi)], ids=lambda param: f"ranks-{param}")
def on_ranks(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Return a function that calls ``check(comm, *args)`` on every rank."""
    if request.param != "mpi":
        yield LocalWorld(request.param, timeout_s=PATIENCE_S).run
        return
    world: Communicator = request.getfixturevalue("world")

    def run(check: Check, *args: Any) -> None:
        check(world, *args)

    yield run
