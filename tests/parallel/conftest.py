"""Every check here takes a communicator, and runs on the world under ``mpiexec`` (1 to 4 ranks), and on threads.

Of threads three ranks are enough by default: uneven, and every size is run by processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mpitrain.comm import Communicator, LocalWorld

PATIENCE_S = 20.0

Check = Callable[..., Any]


RANKS = [
    *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2, 4)),
    3,
    pytest.param("mpi", marks=pytest.mark.mpi),
]


@pytest.fixture(params=RANKS, ids=lambda param: f"ranks-{param}")
def on_ranks(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Return a function that calls ``check(comm, *args)`` on every rank."""
    if request.param != "mpi":
        yield LocalWorld(request.param, timeout_s=PATIENCE_S).run
        return
    world: Communicator = request.getfixturevalue("world")

    def run(check: Check, *args: Any) -> None:
        check(world, *args)

    yield run
