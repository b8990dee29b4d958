"""Gradient-parallel training by job file: what a line gives, what is refused, and runs that change their method."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from mpitrain._errors import JobError
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.parallel import DataParallel, GradientParallel
from mpitrain.train.assembly import assemble
from mpitrain.train.job import Job
from mpitrain.train.resumption import check_same_job
from mpitrain.train.session import train_job

TOML = """
[data]
source = "digits"
options = { flat = true }
[model]
kind = "mlp"
hidden = [16]
[optimizer]
kind = "adam"
[method]
METHOD
[train]
steps = STEPS
batch_size = 64
"""


def job(method: str, steps: int = 4) -> Job:
    return Job.from_toml(TOML.replace("METHOD", method).replace("STEPS", str(steps)), "a.toml")


@pytest.mark.parametrize(
    ("lines", "stage"),
    [
        ('kind = "gradient"', 1),
        ('kind = "gradient"\nstage = 2\nmicrobatches = 3', 2),
        ('kind = "gradient"\nstage = 3', 3),
    ],
)
def test_a_line_chooses_the_method(lines: str, stage: int):
    def check(comm: Communicator) -> None:
        method = assemble(job(lines), comm).method
        assert isinstance(method, GradientParallel)
        assert (method.stage, method.microbatches) == (stage, 3 if stage == 2 else 1)

    LocalWorld(2).run(check)
    assert Job.from_toml(job(lines).to_toml(), "b.toml").method == job(lines).method


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('kind = "gradient"\nstage = 4', "a.toml: method.stage: is too large; got 4; expected integer ≥ 1 and ≤ 3"),
        (
            "stage = 2",
            'method.stage: says what is divided, which kind = "data_parallel" does not; got 2; expected kind = ',
        ),
        ('kind = "gradient"\ncodec = "fp16"', "method.codec.kind: gives every rank all gradients, which kind = "),
        ('kind = "gradient"\naverage_every = 2', "method.average_every: averages whole models, of which kind = "),
        (
            'kind = "gradients"',
            'got "gradients"; expected "data_parallel" or "gradient" or "pipeline"; did you mean "gradient"?',
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(lines: str, message: str):
    with pytest.raises(JobError) as caught:
        job(lines)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "allowed"),
    [
        ('kind = "gradient"\nstage = 2', True),
        ("bucket_bytes = 1000", True),
        ("average_every = 2", False),
        ('kind = "gradient"\nmicrobatches = 2', False),
    ],
)
def test_a_run_may_change_how_its_steps_are_divided_and_not_what_they_are(tmp_path: Path, lines: str, allowed: bool):
    (tmp_path / "job.toml").write_text(job("").to_toml())
    with nullcontext() if allowed else pytest.raises(JobError, match="the job is not the one"):
        check_same_job(job(lines), tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_under_another_method_and_number_of_ranks(tmp_path: Path):
    pytest.importorskip("sklearn")

    def trained(comm: Communicator, method: str, steps: int, **options: Any) -> dict[str, Any]:
        return train_job(job(method, steps), comm, **options)

    run = tmp_path / "run"
    LocalWorld(2).run(lambda comm: trained(comm, 'kind = "data_parallel"', 2, run_dir=run))
    resumed = LocalWorld(3).run(lambda comm: trained(comm, 'kind = "gradient"\nstage = 3', 4, resume=run))[0]
    whole = LocalWorld(1).run(lambda comm: trained(comm, "", 4, run_dir=tmp_path / "whole"))[0]
    assert resumed["steps"] == whole["steps"] == 4
    assert resumed["metrics"]["test_loss"] == pytest.approx(whole["metrics"]["test_loss"], rel=1e-5)


def test_data_parallel_is_the_default():
    assert isinstance(LocalWorld(1).run(lambda comm: assemble(job(""), comm).method)[0], DataParallel)
