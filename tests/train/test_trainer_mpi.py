"""Whole runs over real MPI, on however many ranks this world has."""

import json
from pathlib import Path

import pytest
from commands import metrics, write_job

from mpitrain._errors import InputError, PeerError, StorageError
from mpitrain.comm import LocalWorld
from mpitrain.train import load_job, session, train_job
from mpitrain.train.rundir import RunDirectory

pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(session, "write_report", lambda path: path / "report.html")


@pytest.fixture
def folder(world, tmp_path):
    """The folder of rank 0, with a job in it, on all ranks."""
    if world.rank == 0:
        write_job(tmp_path)
    return Path(world.broadcast_object(str(tmp_path)))


@pytest.fixture
def load(world, folder):
    """Return a function that loads the job with changes."""

    def load(**changes):
        overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
        return load_job(folder / "job.toml", overrides, world)

    return load


@pytest.mark.parametrize("partition", ["none", "by_feature"])
def test_the_result_is_that_of_one_rank(world, folder, tmp_path, load, partition):
    """By feature: with more than one rank no shard has all classes, and of four ranks one has no rows."""
    job = load(dtype="float64", data__partition=partition)
    found = train_job(job, world, run_dir=folder / "run")
    (serial,) = LocalWorld(1).run(lambda comm: train_job(job, comm, run_dir=tmp_path / "serial"))
    assert found["ranks"] == world.size
    assert found["loss"] == pytest.approx(serial["loss"], rel=1e-9)
    assert found["metrics"] == pytest.approx(serial["metrics"], rel=1e-9)
    assert found["confusion"] == serial["confusion"]
    assert world.allgather_object(found) == [found] * world.size


@pytest.mark.parametrize("changes", [{}, {"method__average_every": 3}], ids=["data-parallel", "local SGD"])
def test_resumes_exactly(world, folder, load, changes):
    whole = train_job(load(**changes), world, run_dir=folder / "whole")
    train_job(load(**changes, train__steps=15), world, run_dir=folder / "parts")
    resumed = train_job(load(**changes), world, resume=folder / "parts")
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    steps = [(record["kind"], record["step"]) for record in metrics(folder / "parts")]
    assert len(set(steps)) == len(steps)


def test_a_full_disk_ends_all_ranks_alike(world, folder, load, monkeypatch):
    def full(self, record):
        raise StorageError("disk is full", operation="append metrics")

    monkeypatch.setattr(RunDirectory, "append_metrics", full)
    with pytest.raises(StorageError if world.rank == 0 else PeerError, match="disk is full") as caught:
        train_job(load(), world, run_dir=folder / "run")
    assert caught.value.exit_code == 1


def test_what_does_not_fit_is_refused_by_all_ranks(world, folder, load):
    with pytest.raises(InputError, match="the batch does not fit the data set"):
        train_job(load(train__batch_size=500), world, run_dir=folder / "run")
    world.barrier()
    assert not (folder / "run").exists()
