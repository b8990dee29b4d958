"""Checkpoints over real MPI: written and read by however many ranks this world has."""

import numpy as np
import pytest

from mpitrain._errors import MpitrainError
from mpitrain.arrays import Layout, Segment
from mpitrain.comm import world
from mpitrain.method.state import State, fill, pieces_of
from mpitrain.train.checkpoint import load, save
from mpitrain.train.rundir import RunDirectory

pytestmark = pytest.mark.mpi

LAYOUT = Layout.build([Segment("weight", (7, 5)), Segment("bias", (5,), group="no_decay")])


def test_sharded_state_comes_back(tmp_path):
    comm = world()
    run = RunDirectory.create(comm, "job", root=tmp_path)  # that of rank 0 on all
    shard = LAYOUT.shards(comm.size)[comm.rank]
    flat = np.arange(shard.start, shard.stop, dtype=np.float32)
    path = save(run.checkpoints, 5, State(pieces_of("params", flat, shard), {"epoch": 2}), comm, LAYOUT)
    comm.barrier()
    opened = load(path, comm, LAYOUT)
    whole = np.full(LAYOUT.size, -1, np.float32)
    fill("params", whole, LAYOUT.whole(), opened.read)
    for segment in LAYOUT:
        np.testing.assert_array_equal(whole[segment.offset : segment.stop], np.arange(segment.offset, segment.stop))
    assert opened.scalars == {"epoch": 2}


def test_a_disk_error_ends_all_ranks_alike(tmp_path):
    comm = world()
    blocked = RunDirectory.create(comm, "job", root=tmp_path).path / "file"
    if comm.rank == 0:
        blocked.write_text("")
    comm.barrier()
    with pytest.raises(MpitrainError, match="File exists") as caught:
        save(blocked, 1, State(()), comm, LAYOUT)
    assert caught.value.exit_code == 1
