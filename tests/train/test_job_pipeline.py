"""Pipeline-parallel training by job file: what the lines give, what is refused, and runs that change their method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpitrain._errors import InputError, JobError
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.parallel import PipelineParallel
from mpitrain.parallel.pipeline import FAMILIES
from mpitrain.train.assembly import assemble
from mpitrain.train.job import Job
from mpitrain.train.job.train import MethodSection
from mpitrain.train.session import train_job

TOML = """
[data]
source = "digits"
[model]
kind = "cnn"
channels = [4, 4]
hidden = 8
[optimizer]
kind = "adam"
[method]
microbatches = 4
METHOD
[train]
steps = STEPS
batch_size = 64
"""


def job(method: str, steps: int = 4) -> Job:
    return Job.from_toml(TOML.replace("METHOD", method).replace("STEPS", str(steps)), "a.toml")


def test_every_schedule_has_a_name_in_job_files():
    annotation = MethodSection.model_fields["schedule"].annotation
    assert list(annotation.__args__) == list(FAMILIES)


def test_a_line_chooses_the_method():
    lines = 'kind = "pipeline"\nschedule = "interleaved"\nchunks = 2'

    def check(comm: Communicator) -> None:
        method = assemble(job(lines), comm).method
        assert isinstance(method, PipelineParallel)
        assert (method.schedule.name, method.sizes.chunks, method.microbatches) == ("interleaved", 2, 4)
        assert method.costs is not None
        assert method.costs[0] > method.costs[-1]  # the first convolution is more work than the last layer

    LocalWorld(2).run(check)
    assert Job.from_toml(job(lines).to_toml(), "b.toml").method == job(lines).method


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            'schedule = "gpipe"',
            'method.schedule: is the order of a pipeline; got "gpipe"; expected method.kind = "pipeline", or mesh.pipe',
        ),
        (
            'kind = "pipeline"\nchunks = 2',
            "method.chunks: are stages that only one schedule has; got 2; expected sched",
        ),
        (
            'kind = "pipeline"\nschedule = "zb"',
            'method.schedule: is not one of the choices; got "zb"; expected "gpipe"',
        ),
        ('kind = "pipeline"\ncodec = "fp16"', 'gives every rank all gradients, which kind = "pipeline" divides'),
        ('kind = "pipeline"\naverage_every = 2', "averages whole models, of which kind = "),
        ('kind = "pipeline"\nstage = 2', 'says what is divided, which kind = "pipeline" does not'),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(lines: str, message: str):
    with pytest.raises(JobError) as caught:
        job(lines)
    assert message in str(caught.value)


def test_a_batch_may_be_smaller_than_the_ranks_are_many():
    small = Job.from_toml(job('kind = "pipeline"').to_toml(), "a.toml", ["train.batch_size=4"])

    def check(comm: Communicator) -> int:
        parts = assemble(small, comm)
        handed_in = comm.allgather_object(sum(map(len, parts.held_out["test"]())))
        assert sum(handed_in) == len(parts.samples.held_out["test"])  # each row is evaluated once
        return int(parts.method.advance(parts.feed, until=1).samples)

    assert LocalWorld(6, timeout_s=20).run(check) == [4] * 6


def test_microbatches_that_do_not_fit_the_ranks_are_said():
    lines = 'kind = "pipeline"\nschedule = "interleaved"'
    with pytest.raises(InputError, match="got 4 microbatches, 3 ranks; expected a multiple of 3"):
        LocalWorld(3, timeout_s=10).run(lambda comm: assemble(job(lines), comm))


@pytest.mark.slow
def test_a_run_goes_on_under_another_method_and_its_weights_are_the_same_bits(tmp_path: Path):
    """CNN with BatchNorm and Dropout: from one rank to a pipeline of three, and back."""
    pytest.importorskip("sklearn")

    def trained(ranks: int, method: str, steps: int, **options: Any) -> dict[str, Any]:
        return LocalWorld(ranks).run(lambda comm: train_job(job(method, steps), comm, **options))[0]

    run, pipeline = tmp_path / "run", 'kind = "pipeline"\nschedule = "zb-h1"'
    trained(1, "", 2, run_dir=run)
    trained(3, pipeline, 4, resume=run)
    resumed = trained(1, "", 6, resume=run)
    whole = trained(2, 'kind = "pipeline"', 6, run_dir=tmp_path / "whole")
    assert resumed["steps"] == whole["steps"] == 6
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["metrics"]["test_accuracy"] == whole["metrics"]["test_accuracy"]
