"""What `mpitrain verify` records where methods sum while they update, as they do by default on a node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from commands import write_job

from mpitrain.comm import Communicator
from mpitrain.comm.local import alone
from mpitrain.optim import Terms
from mpitrain.parallel.in_place import CommonGradients
from mpitrain.train import load_job
from mpitrain.train.comparison import Difference, compare
from mpitrain.train.record import record

pytestmark = pytest.mark.mpi

STEPS, TOLERANCE = 3, 1e-10


def first_difference(world: Communicator, path: Path, method: str) -> Difference | None:
    """Return, on all ranks, where a job on them differs first from the serial run."""
    job = load_job(path, ["dtype=float64", f"method.kind={method}"], world)
    found, expected = record(job, world, STEPS), record(job, alone(), STEPS)
    first = compare(found, expected, TOLERANCE).first if found and expected else None
    told: Difference | None = world.broadcast_object(first)
    return told


@pytest.mark.parametrize("method", ["data_parallel", "gradient"])
def test_a_rank_that_leaves_out_the_others_gradients_is_found(world, tmp_path, monkeypatch, method):
    whole = CommonGradients.terms

    def own(self: CommonGradients, count: float) -> Terms:
        found = whole(self, count)
        return replace(found, arrays=(found.arrays[found.own],), own=0)

    # written once: a rank may be behind, and still read its files
    path = world.broadcast_object(write_job(tmp_path) if world.rank == 0 else None)
    assert first_difference(world, path, method) is None
    monkeypatch.setattr(CommonGradients, "terms", own)
    first = first_difference(world, path, method)
    assert (first is None) == (world.size == 1)
    if first is not None:
        assert (first.what, first.step) == ("gradient", 1)
