"""The trainer on ranks that are threads: its run's directory, the best checkpoint, and what it refuses."""

import errno
import json
import tomllib

import numpy as np
import pytest
from commands import metrics
from trainer_cases import PATIENCE_S, train

from mpitrain._errors import InputError, JobError, PeerError, StorageError
from mpitrain.comm import LocalWorld
from mpitrain.train import Job, Observer, checkpoint, session, train_job
from mpitrain.train.assembly import assemble
from mpitrain.train.facts import Facts
from mpitrain.train.models import build_model
from mpitrain.train.predictor import Predictor
from mpitrain.train.rundir import RunDirectory
from mpitrain.train.storage import alone
from mpitrain.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_pictures")


class Intruder(Observer):
    """Tries to take the run's directory while the job trains."""

    def __init__(self, path):
        self.path, self.seen = path, []

    def on_metrics(self, record):
        with pytest.raises(JobError, match="run: another job writes to this run; wait for its end"), alone(self.path):
            pass
        self.seen.append(record)


def test_a_run_has_one_job_at_a_time(load, tmp_path):
    path = tmp_path / "run"
    for where, steps in (({"run_dir": path}, 12), ({"resume": path}, 18)):
        intruder = Intruder(path)
        train(load(train__steps=steps), observer=intruder, **where)
        assert intruder.seen
        with alone(path), pytest.raises(JobError, match="another job writes to this run"):
            train(load(), resume=path)


def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    def refuse(handle, how):
        raise OSError(errno.EBADF, "no such locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    with alone(tmp_path), alone(tmp_path):
        pass


def test_a_trainer_evaluates_before_it_trains(load, tmp_path):
    """Of research code, which evaluates when it likes; the seconds that were trained before are kept."""
    job = load()
    train(job, run_dir=tmp_path / "whole")

    def run(comm):
        directory = RunDirectory.create(comm, job.name, path=tmp_path / "run")
        trainer = Trainer(job, comm, assemble(job, comm), directory)
        first = trainer.evaluate("test")
        saved = checkpoint.load(checkpoint.latest(tmp_path / "whole" / "checkpoints"), comm)
        trainer.restore(saved)
        assert trainer.evaluate("test")["loss"] < first["loss"]
        return trainer.standing.seconds >= saved.scalars["standing"]["seconds"] > 0

    assert LocalWorld(2, timeout_s=PATIENCE_S).run(run) == [True, True]


def test_a_report_that_cannot_be_written_loses_no_run(load, tmp_path, monkeypatch):
    class Listener(Observer):
        def on_note(self, text: str) -> None:
            notes.append(text)

    def damaged(path):
        raise InputError("costs.json: cannot be read")

    notes: list[str] = []
    monkeypatch.setattr(session, "write_report", damaged)
    result = train(load(), ranks=1, run_dir=tmp_path / "run", observer=Listener())
    assert (result["completed"], result["report"], notes[-1]) == (True, None, "no report: costs.json: cannot be read")
    assert (tmp_path / "run/COMPLETED").is_file()


def test_the_best_checkpoint_is_kept_and_used(load, tmp_path):
    """Training climbs away from its best loss, which the newest checkpoints therefore do not have."""
    run = tmp_path / "run"
    job = load(optimizer__kind="sgd", optimizer__lr=3.0, train__checkpoint__keep=2, train__steps=48)
    train(job, run_dir=run)
    losses = {r["step"]: r["loss"] for r in metrics(run) if r["kind"] == "test"}
    best = min(losses, key=losses.get)
    names = {path.name for path in checkpoint.checkpoints(run / "checkpoints")}
    assert best not in (42, 48), "the job must have its best before the end"
    assert names == {f"step-{step:08d}" for step in (best, 42, 48)}
    assert Predictor(str(run)).checkpoint == f"step-{best:08d}"
    assert Predictor(run, latest=True).checkpoint == "step-00000048"


def test_predictions_are_those_of_the_model(load, tmp_path):
    result = train(load(data__standardise=True), run_dir=tmp_path / "run")
    held_out = assemble_samples(load(data__standardise=True))
    predictor = Predictor(tmp_path / "run", latest=True)
    with pytest.raises(InputError, match=r"predict: the samples are no array; got list; .*numpy\.asarray"):
        predictor.outputs([[0.0]])
    with np.load(tmp_path / "data.npz") as data:
        raw, labels = data["inputs"], data["targets"]
    answers = np.array(predictor.answers(predictor.outputs(raw)))
    rows = [int(np.flatnonzero((raw == sample).all(axis=1))[0]) for sample in held_out]
    accuracy = (answers[rows] == labels[rows]).mean()
    assert accuracy == pytest.approx(result["metrics"]["test_accuracy"])


def assemble_samples(job):
    """Return the raw inputs of a job's test part."""
    samples = LocalWorld(1).run(lambda comm: assemble(job, comm).samples)[0]
    scaling = samples.standardise.inputs
    scaled = samples.held_out["test"].rows(np.arange(len(samples.held_out["test"])))[0]
    raw = scaled * scaling.scale + scaling.mean
    with np.load(job.data.path) as data:
        every = data["inputs"]
    return [every[np.abs(every - sample).max(axis=1).argmin()] for sample in raw]


def test_the_result_is_kept(load, tmp_path):
    result = train(load(), run_dir=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    kept = tomllib.loads((tmp_path / "run" / "job.toml").read_text())
    assert kept["train"]["steps"] == 24
    assert Job.load(tmp_path / "run" / "job.toml") == load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__batch_size": 2}, "batch is smaller than the number of ranks; got batch_size 2, 3 ranks"),
        ({"train__batch_size": 97}, "batch does not fit the data set"),
        ({"train__checkpoint__best": "acuracy"}, "train.checkpoint.best: the model gives no such metric; got acuracy"),
        ({"train__stop__patience": 1, "train__stop__metric": "r2"}, "train.stop.metric: .* accuracy or loss"),
        (
            {"optimizer__schedule__warmup_steps": 5, "train__epochs": 1, "train__batch_size": 96},
            r"^optimizer.schedule.warmup_steps: leaves no step after the warm-up; got 5; expected less than the run's "
            "1 steps; set optimizer.schedule.warmup_steps=0, or train longer",
        ),
    ],
)
def test_what_does_not_fit_is_refused_on_all_ranks(load, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train(load(**changes), ranks=3, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_flat_samples_get_the_shape_that_the_model_was_trained_on(tmp_path, load):
    with np.load(tmp_path / "data.npz") as data:
        images, targets = data["inputs"][:, :4].reshape(-1, 2, 2, 1), data["targets"]
    np.savez(tmp_path / "data.npz", inputs=images, targets=targets)
    train(load(train__steps=1), ranks=1, run_dir=tmp_path / "run")
    np.save(tmp_path / "flat.npy", images.reshape(-1, 4))
    np.testing.assert_array_equal(Predictor(tmp_path / "run").read(tmp_path / "flat.npy"), images)


def test_a_convolutional_model_of_rows_of_a_table_is_refused(job_file):
    job = Job.from_toml(job_file.read_text().replace('kind = "mlp"\nhidden = [12]', 'kind = "cnn"'), job_file)
    said = r'^model.kind = "cnn": needs images; got samples of shape \(2,\); .*; or set model.kind = "mlp"$'
    with pytest.raises(JobError, match=said):
        build_model(job, Facts("classification", (2,), 3))


def test_a_full_disk_is_agreed_on(load, tmp_path, monkeypatch):
    """Rank 0 alone writes, and all ranks leave with the same verdict."""

    def full(self, record):
        raise StorageError("disk is full", operation="append metrics")

    monkeypatch.setattr(RunDirectory, "append_metrics", full)

    def run(comm):
        try:
            train_job(load(), comm, run_dir=tmp_path / "run")
        except (StorageError, PeerError) as error:
            return type(error), error.exit_code
        return None

    assert LocalWorld(3, timeout_s=PATIENCE_S).run(run) == [(StorageError, 1), (PeerError, 1), (PeerError, 1)]


def test_an_observer_sees_the_metrics_file(load, tmp_path):
    class Watcher(Observer):
        def __init__(self):
            self.records, self.ended = [], 0

        def on_metrics(self, record):
            self.records.append(record)

        def on_end(self):
            self.ended += 1

    watcher = Watcher()
    train(load(), ranks=1, run_dir=tmp_path / "run", observer=watcher)
    assert watcher.records == metrics(tmp_path / "run")
    assert watcher.ended == 1
