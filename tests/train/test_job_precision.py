"""Mixed precision by job file: what is refused, what a run says of it, and a run that is resumed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import accuracy
import numpy as np
import pytest
from commands import metrics, write_job

from mpitrain._errors import JobError, MissingExtraError
from mpitrain.comm import LocalWorld
from mpitrain.parallel import (
    DataParallel,
    GradientParallel,
    GradientPipelineParallel,
    ModelAveraging,
    PipelineParallel,
    ReproducibleDataParallel,
    ReproducibleGradientParallel,
    ReproducibleGradientPipelineParallel,
    ReproduciblePipelineParallel,
)
from mpitrain.train import session, train_job
from mpitrain.train.assembly import assemble
from mpitrain.train.job import Job

EMULATED = ("precision.compute=float16", "precision.emulate=true")


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    return write_job(tmp_path)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "write_report", lambda path: path / "report.html")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["precision.compute=float16"], 'needs device = "gpu"; got "float16"; .*CPUs train in float32: leave out'),
        (["precision.compute=bfloat16"], 'needs device = "gpu"; got "bfloat16"; .*precision.emulate = true'),
        (["precision.emulate=true"], "precision.emulate: allows 16 bits, which are not asked for"),
        (["precision.compute=half"], "precision.compute"),
        (["precision.initial_scale=2"], 'precision.initial_scale: is of the loss scale.*compute = "float16" beside it'),
        ([*EMULATED, "precision.backoff_factor=1"], "precision.backoff_factor"),
        ([*EMULATED, "dtype=float64"], 'dtype: does not go with precision.compute = "float16"'),
        ([*EMULATED, "method.codec=int8"], 'method.codec.kind: .*precision.compute = "bfloat16"'),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(job_file: Path, settings: list[str], message: str):
    with pytest.raises(JobError, match=message):
        Job.load(job_file, settings)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ((), DataParallel),
        (("method.average_every=2",), ModelAveraging),
        (("method.kind=gradient", "method.stage=3"), GradientParallel),
        (("method.kind=pipeline",), PipelineParallel),
        (("method.kind=gradient", "mesh.pipe=2"), GradientPipelineParallel),
        (("reproducible=true",), ReproducibleDataParallel),
        (("reproducible=true", "method.kind=gradient"), ReproducibleGradientParallel),
        (("reproducible=true", "method.kind=pipeline"), ReproduciblePipelineParallel),
        (("reproducible=true", "method.kind=gradient", "mesh.pipe=2"), ReproducibleGradientPipelineParallel),
    ],
)
def test_a_method_computes_as_the_job_says(job_file: Path, settings: tuple[str, ...], kind: type):
    job = Job.load(job_file, [*EMULATED, "precision.growth_interval=7", *settings])
    parts = LocalWorld(job.mesh.pipe or 1).run(lambda comm: assemble(job, comm))[0]
    assert type(parts.method) is kind
    assert parts.method.precision.compute == "float16"
    assert parts.method.precision.growth_interval == 7
    assert parts.title.endswith(", passes in float16, which the CPU emulates")


@pytest.mark.parametrize(("batch_size", "scale"), [(1, 2.0**16), (16, 2.0**12), (17, 2.0**11)])
def test_the_first_scale_is_that_of_a_mean(job_file: Path, batch_size: int, scale: float):
    job = Job.load(job_file, [*EMULATED, f"train.batch_size={batch_size}"])
    (parts,) = LocalWorld(1).run(lambda comm: assemble(job, comm))
    assert parts.method.loss_scale == scale


def test_the_first_scale_of_a_text_counts_tokens(tmp_path: Path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 12)
    job = Job.from_dict(
        {
            "data": {"source": "text", "path": str(tmp_path / "text.txt"), "options": {"context": 8}},
            "model": {"kind": "gpt", "layers": 1, "width": 8, "heads": 2},
            "optimizer": {"kind": "adam"},
            "train": {"batch_size": 4, "steps": 1},
            "precision": {"compute": "float16", "emulate": True},
        }
    )
    (parts,) = LocalWorld(1).run(lambda comm: assemble(job, comm))
    assert parts.method.loss_scale == 2.0**16 / 32


def train(job: Job, **options: Any) -> dict[str, Any]:
    results = LocalWorld(2).run(lambda comm: train_job(job, comm, report=False, **options))
    return results[0]


PIPELINE = ("method.kind=pipeline", "method.microbatches=4")
DIVIDED = ("method.kind=gradient", "mesh.pipe=2", "method.microbatches=4")


@pytest.mark.parametrize("method", [(), PIPELINE, DIVIDED], ids=["data", "pipeline", "gradient and pipeline"])
def test_a_run_tells_its_scale_and_skips_and_is_resumed_with_them(
    job_file: Path, tmp_path: Path, method: tuple[str, ...]
):
    settings = [*EMULATED, *method, "precision.initial_scale=1e7", "train.steps=30", "train.checkpoint.every_steps=10"]
    whole = train(Job.load(job_file, settings), run_dir=tmp_path / "whole")
    assert 0 < whole["skipped_steps"] < 25
    assert whole["loss_scale"] == 1e7 / 2 ** whole["skipped_steps"]
    records = [record for record in metrics(tmp_path / "whole") if record["kind"] == "train"]
    assert records[-1]["skipped_steps"] == whole["skipped_steps"]
    assert records[-1]["loss_scale"] == whole["loss_scale"]
    train(Job.load(job_file, [*settings, "train.steps=10"]), run_dir=tmp_path / "part")
    resumed = train(Job.load(job_file, settings), resume=tmp_path / "part")
    for key in ("skipped_steps", "loss_scale", "weights_sha256", "loss"):
        assert resumed[key] == whole[key]
    plain = train(Job.load(job_file, ["train.steps=2"]), run_dir=tmp_path / "plain")
    assert not {"skipped_steps", "loss_scale"} & set(plain)


def test_bfloat16_without_ml_dtypes_is_one_line(job_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    job = Job.load(job_file, ["precision.compute=bfloat16", "precision.emulate=true"])
    with pytest.raises(MissingExtraError, match=r"NumPy has no bfloat16 of its own; .*pip install ml_dtypes"):
        LocalWorld(1).run(lambda comm: assemble(job, comm))


def test_verify_wants_float64(job_file: Path):
    command = [sys.executable, "-m", "mpitrain", "verify", str(job_file), *(f"--set={each}" for each in EMULATED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "in 16 bits layouts differ by rounding, and skipped steps have no gradients to compare" in done.stderr
    assert "--set 'precision={}'" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("compute", ["float16", "bfloat16"])
def test_digits_are_read_as_well_in_16_bits(compute: str):
    settings = (f"precision.compute={compute}", "precision.emulate=true")
    found = [accuracy.run("digits_cnn", f"seed={seed}", *settings)["test_accuracy"] for seed in accuracy.SEEDS]
    assert np.mean(found) >= 0.98
