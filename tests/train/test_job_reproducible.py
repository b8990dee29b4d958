"""Reproducible jobs: whole runs with the same bits on every number of ranks, also when one goes on on another."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
from commands import JOB, metrics, write_job

from mpitrain._errors import JobError, MismatchError
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.train import Job, Observer, session, train_job
from mpitrain.train.fingerprint import agreed_fingerprint, changes, fingerprint

LANES = 5
"""Of 16 samples four lanes have three, and one four; 96 samples are six batches."""

METHODS: dict[str, dict[str, Any]] = {
    "data": {},
    "gradient 1": {"method__kind": "gradient"},
    "gradient 2": {"method__kind": "gradient", "method__stage": 2},
    "pipeline": {"method__kind": "pipeline", "method__schedule": "zb-h1"},
    "data and pipeline": {"mesh__data": 2, "mesh__pipe": 2},
    "gradient and pipeline": {"mesh__data": 2, "mesh__pipe": 2, "method__kind": "gradient"},
}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "write_report", lambda path: path / "report.html")


def job(folder: Path, **changes: Any) -> Job:
    """Return a job with BatchNorm, Dropout, clipping and evaluations: 13 steps, so that an epoch is cut."""
    fixed = {"reproducible": True, "lanes": LANES, "optimizer__clip_norm": 0.5, "train__steps": 13}
    settings = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in (fixed | changes).items()]
    return Job.load(folder / "job.toml", settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_job(tmp_path)
    return tmp_path


def run(ranks: int, what: Job, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = LocalWorld(ranks).run(lambda comm: train_job(what, comm, **options))[0]
    return found


def numbers(path: Path) -> list[dict[str, Any]]:
    """What the metrics of a run say, but for times."""
    return [{k: v for k, v in each.items() if k not in ("seconds", "samples_per_s")} for each in metrics(path)]


@pytest.mark.parametrize(
    ("ranks", "method"),
    [
        (2, "gradient 1"),
        (3, "data"),
        (4, "gradient 2"),
        (3, "pipeline"),
        (4, "data and pipeline"),
        (4, "gradient and pipeline"),
    ],
)
def test_weights_losses_and_metrics_have_the_bits_of_one_rank(folder, ranks, method):
    serial = run(1, job(folder), run_dir=folder / "serial")
    found = run(ranks, job(folder, **METHODS[method]), run_dir=folder / "found")
    assert found["weights_sha256"] == serial["weights_sha256"]
    assert found["metrics"] == serial["metrics"]
    assert numbers(folder / "found") == numbers(folder / "serial")
    other = run(1, job(folder, lanes=LANES + 1), run_dir=folder / "other")
    assert other["weights_sha256"] != serial["weights_sha256"]


MIXED: dict[str, dict[str, Any]] = {
    "float16": {"precision__compute": "float16", "precision__emulate": True, "precision__initial_scale": 1e6},
    "bfloat16": {"precision__compute": "bfloat16", "precision__emulate": True},
}


@pytest.mark.parametrize(
    ("ranks", "method", "compute"),
    [
        (2, "gradient 1", "float16"),
        (3, "data", "bfloat16"),
        (4, "gradient 2", "bfloat16"),
        (3, "pipeline", "float16"),
        (4, "data and pipeline", "float16"),
        (4, "gradient and pipeline", "float16"),
    ],
)
def test_so_have_those_of_passes_in_16_bits(folder, ranks, method, compute):
    serial = run(1, job(folder, **MIXED[compute]), run_dir=folder / "serial")
    assert (serial["skipped_steps"] > 0) if compute == "float16" else "skipped_steps" not in serial
    found = run(ranks, job(folder, **METHODS[method], **MIXED[compute]), run_dir=folder / "found")
    for key in ("weights_sha256", "metrics", "loss"):
        assert found[key] == serial[key]
    assert repr(numbers(folder / "found")) == repr(numbers(folder / "serial"))  # losses of skipped steps are NaN
    in_full = run(1, job(folder), run_dir=folder / "full")
    assert in_full["weights_sha256"] != serial["weights_sha256"]


@pytest.mark.parametrize(
    ("first", "then", "method"),
    [
        ("data", 1, "gradient 1"),
        ("data", 4, "gradient 1"),
        ("data", 4, "gradient and pipeline"),
        ("pipeline", 2, "data"),
    ],
)
def test_goes_on_with_the_same_bits_on_another_number_of_ranks(folder, first, then, method):
    whole = run(2, job(folder), run_dir=folder / "whole")
    run(3, job(folder, train__steps=8, **METHODS[first]), run_dir=folder / "parts")
    resumed = run(then, job(folder, **METHODS[method]), resume=folder / "parts")
    assert resumed["steps"] == 13
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["metrics"] == whole["metrics"]


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("method", "precision"),
    [("data", {}), ("gradient 1", {}), ("pipeline", {}), ("pipeline", MIXED["float16"])],
    ids=["data", "gradient 1", "pipeline", "pipeline-float16"],
)
def test_a_run_over_mpi_has_the_bits_of_one_rank(world, tmp_path, method, precision):
    if world.rank == 0:
        write_job(tmp_path)
    shared = Path(world.broadcast_object(str(tmp_path)))
    found = train_job(job(shared, **METHODS[method], **precision), world, run_dir=shared / "run")
    serial = run(1, job(shared, **precision), run_dir=tmp_path / "serial")
    assert found["weights_sha256"] == serial["weights_sha256"]
    assert found["loss"] == serial["loss"]
    assert found["metrics"] == serial["metrics"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 17}, "lanes: is more than the samples of a batch; got 17; expected at most train.batch_size = 16"),
        ({"reproducible": False}, "lanes: is for jobs that are reproducible; got 5; expected reproducible = true"),
        ({"method__codec": "int8"}, "method.codec.kind: rounds by what each rank has"),
        ({"method__average_every": 2}, "method.average_every: gives another model on every number of ranks"),
        ({"device": "gpu"}, 'device: is not shown to be reproducible yet; got "gpu"; expected "cpu"'),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(folder, changes, message):
    with pytest.raises(JobError) as caught:
        job(folder, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_full_batch_is_known_when_the_data_are(folder):
    with pytest.raises(JobError, match="lanes: is more than the samples of a batch; got 97; expected at most 96"):
        run(1, job(folder, lanes=97, train__batch_size="full"), run_dir=folder / "run")


def test_twelve_lanes_by_default():
    text = JOB.replace("batch_size = 16", "batch_size = 64")
    assert Job.from_toml(f"reproducible = true\n{text}", "a.toml").lanes == 12
    assert Job.from_toml(text, "a.toml").lanes is None


def test_another_number_of_lanes_is_another_run(folder):
    run(1, job(folder, train__steps=3), run_dir=folder / "run")
    with pytest.raises(JobError, match=r"the job is not the one .* lanes = 6, the run has 5"):
        run(1, job(folder, lanes=6), resume=folder / "run")


class Notes(Observer):
    """Keeps what is remarked."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def test_the_run_keeps_its_fingerprint_and_says_when_it_goes_on_under_another(folder):
    run(2, job(folder, train__steps=3), run_dir=folder / "run")
    path = folder / "run" / "environment.json"
    environment = json.loads(path.read_text())
    assert environment["fingerprint"] == fingerprint()

    same = Notes()
    run(1, job(folder, train__steps=4), resume=folder / "run", observer=same)
    assert same.notes == []

    path.write_text(json.dumps(environment | {"fingerprint": fingerprint() | {"NumPy": "1.0"}}))
    other = Notes()
    run(1, job(folder, train__steps=5), resume=folder / "run", observer=other)
    (note,) = other.notes
    assert note.endswith(f"here on: NumPy 1.0, now {fingerprint()['NumPy']}")
    assert json.loads(path.read_text())["fingerprint"] == fingerprint()


def test_a_run_that_is_not_reproducible_has_no_fingerprint(folder):
    run(1, Job.load(folder / "job.toml", ["train.steps=2"]), run_dir=folder / "run")
    assert "fingerprint" not in json.loads((folder / "run" / "environment.json").read_text())


def test_the_fingerprint_names_everything_that_bits_depend_on():
    found = fingerprint()
    assert found.keys() == {
        "processor", "CPU features", "BLAS", "NumPy", "C library", "compiled loops", "mpitrain",
    }  # fmt: skip
    assert "unknown" not in found.values()
    assert "threads" in found["BLAS"]
    pytest.importorskip("ml_dtypes")
    assert fingerprint(in_bfloat16=True) == found | {"ml_dtypes": importlib.metadata.version("ml_dtypes")}


def test_a_job_in_bfloat16_keeps_what_rounds(folder):
    run(1, job(folder, train__steps=1, **MIXED["bfloat16"]), run_dir=folder / "run")
    environment = json.loads((folder / "run" / "environment.json").read_text())
    assert environment["fingerprint"] == fingerprint(in_bfloat16=True)


def test_threads_of_blas_are_part_of_it():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with threadpoolctl.threadpool_limits(1):
        one = fingerprint()["BLAS"]
    with threadpoolctl.threadpool_limits(2):
        assert fingerprint()["BLAS"] != one


def test_compiled_loops_are_part_of_it(monkeypatch):
    monkeypatch.setenv("MPITRAIN_KERNEL", "off")
    assert fingerprint()["compiled loops"] == "no"


def test_ranks_that_differ_are_named_with_what_differs():
    def check(comm: Communicator) -> None:
        own = {"BLAS": "b", "NumPy": "2.0" if comm.rank != 1 else "2.1"}
        with pytest.raises(MismatchError) as caught:
            agreed_fingerprint(comm, own)
        assert "got NumPy: 2.0 on ranks [0, 2] and 2.1 on ranks [1]; start" in str(caught.value)
        assert "BLAS" not in str(caught.value)

    LocalWorld(3).run(check)


def test_changes_of_a_fingerprint():
    assert changes({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == ""
    assert changes({"a": "1", "old": "2"}, {"a": "3", "new": "4"}) == (
        "a 1, now 3; old 2, now unknown; new unknown, now 4"
    )
