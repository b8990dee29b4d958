"""Our own algorithms over MPI, under ``mpiexec``."""

from __future__ import annotations

from collections.abc import Iterator

import algorithm_suite as suite
import numpy as np
import pytest
from conformance import same, values

from mpitrain.comm import Communicator

pytestmark = pytest.mark.mpi


@pytest.fixture
def comm(world: Communicator) -> Iterator[Communicator]:
    """All ranks, on nodes of two."""
    with world.split(0) as comm:
        comm._node = comm.split(comm.rank // 2, axis="node")
        yield comm


@pytest.mark.parametrize(("operation", "name"), suite.PAIRS)
def test_values_over_mpi(comm: Communicator, operation: str, name: str) -> None:
    suite.check_values(comm, operation, name)


@pytest.mark.parametrize(("operation", "name"), sorted(suite.FORMULAS))
def test_messages_and_bytes_over_mpi(comm: Communicator, operation: str, name: str) -> None:
    suite.check_sent(comm, operation, name)


def test_ordered_bits_over_mpi(comm: Communicator) -> None:
    suite.check_ordered_bits(comm)


def test_all_ranks_agree_in_bits_over_mpi(comm: Communicator) -> None:
    suite.check_all_ranks_agree_in_bits(comm)


@pytest.mark.parametrize(("operation", "name"), suite.PAIRS)
def test_long_arrays_over_mpi(comm: Communicator, operation: str, name: str) -> None:
    shape = (comm.size, 300_001)  # several segments and pieces, uneven
    x = values(comm.rank, shape, "float32")
    total = sum(values(r, shape, "float64") for r in range(comm.size)).astype("float32")
    got = getattr(comm, operation)(x, algorithm=name)
    expected = {
        "allreduce": total,
        "reduce": total if comm.rank == 0 else None,
        "broadcast": values(0, shape, "float32"),
        "reduce_scatter": total[comm.rank],
        "allgather": np.stack([values(r, shape, "float32") for r in range(comm.size)]),
    }[operation]
    if expected is None:
        assert got is None
    else:
        same(got, expected)
