"""The conformance suite over MPI, under ``mpiexec``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from conformance import CHECKS, REFUSED, refuses

from mpitrain._errors import MismatchError
from mpitrain.comm import Communicator

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.filterwarnings("ignore:.* was dropped without wait:ResourceWarning"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conforms(world: Communicator, check: Callable[[Communicator], None]) -> None:
    check(world)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_part_of_the_world_conforms(world: Communicator, check: Callable[[Communicator], None]) -> None:
    part = world.split(int(world.rank > 0), axis="world")
    assert part is not None
    with part:
        check(part)


@pytest.mark.parametrize(("call", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refuses(world: Communicator, call: Callable[[Communicator], Any], words: list[str]) -> None:
    refuses(world, call, words)


@pytest.mark.parametrize("length", [2, 4])
def test_a_message_of_another_size_is_an_error(world: Communicator, length: int) -> None:
    request = world.isend(np.zeros(3), (world.rank + 1) % world.size)
    with pytest.raises(MismatchError, match="recv"):
        world.recv(np.zeros(length), (world.rank - 1) % world.size)
    with pytest.raises(MismatchError) if world.debug else nullcontext():  # which tells both sides
        request.wait()


def test_works_on_a_private_duplicate(world: Communicator) -> None:
    from mpi4py import MPI

    ours = Communicator.from_mpi(MPI.COMM_WORLD)
    theirs = MPI.COMM_WORLD.irecv(source=world.rank, tag=0)
    with ours:
        request = ours.isend(np.ones(1), ours.rank)
        assert ours.recv(np.zeros(1), ours.rank) == 1
        request.wait()
    assert not theirs.Test()
    MPI.COMM_WORLD.send("mine", world.rank, tag=0)
    assert theirs.wait() == "mine"
