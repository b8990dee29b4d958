"""A run that was stopped or has crashed, and is resumed, is as if it had never been interrupted."""

import json

import pytest
from commands import metrics
from trainer_cases import PATIENCE_S, Crash, crash_at, train, without_clock

from mpitrain._errors import JobError
from mpitrain.comm import LocalWorld
from mpitrain.train import Observer, checkpoint, train_job
from mpitrain.train.assembly import assemble
from mpitrain.train.rundir import RunDirectory
from mpitrain.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_pictures")


class Stopper(Observer):
    """Asks for a stop as soon as a step is recorded."""

    def __init__(self, step):
        self.step, self.trainer = step, None

    def on_metrics(self, record):
        if record["step"] >= self.step:
            self.trainer.ask_to_stop("the test says so")


def train_until_asked(job, ranks, path, step):
    """Run a job in which the last rank is asked to stop once ``step`` is recorded; return (reason, step)."""

    def run(comm):
        last = comm.rank == comm.size - 1
        observer = Stopper(step) if last else Observer()
        directory = RunDirectory.create(comm, job.name, path=path)
        trainer = Trainer(job, comm, assemble(job, comm), directory, observer)
        if last:
            observer.trainer = trainer
        if comm.rank == 0:
            directory.write_job(job.model_dump(exclude_none=True))
            trainer.parts.samples.facts.write(path)
        return trainer.run(), trainer.method.step

    results = LocalWorld(ranks, timeout_s=PATIENCE_S).run(run)
    assert len(set(results)) == 1
    return results[0]


VARIANTS = {
    "adam, dropout, batch norm": {},
    "momentum": {"optimizer__kind": "momentum", "optimizer__clip_norm": 1.0},
    "lamb": {"optimizer__kind": "lamb"},
    "adagrad in float64": {"optimizer__kind": "adagrad", "dtype": "float64"},
    "two microbatches": {"method__microbatches": 2},
    "partitioned by label": {"data__partition": "by_feature"},
    "local SGD": {"method__average_every": 3},
    "validated": {"data__valid": 0.2},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_stopped_by_steps_and_resumed_is_uninterrupted(load, tmp_path, changes):
    whole = train(load(**changes), run_dir=tmp_path / "whole")
    part = train(load(**changes, train__steps=15), run_dir=tmp_path / "parts")
    assert (part["steps"], part["completed"]) == (15, True)
    assert part["weights_sha256"] != whole["weights_sha256"]
    resumed = train(load(**changes), resume=tmp_path / "parts")
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["metrics"] == whole["metrics"]
    one, two = (without_clock(metrics(tmp_path / name)) for name in ("whole", "parts"))
    assert {key: two[key] for key in one if key[1] % 6 == 0 and key[0] != "train"} == {
        key: one[key] for key in one if key[1] % 6 == 0 and key[0] != "train"
    }
    assert two.keys() - one.keys() <= {("train", 15), ("test", 15), ("valid", 15)}


@pytest.mark.parametrize("changes", [{}, {"method__average_every": 5}], ids=["each step", "local SGD"])
@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_asked_to_stop_and_resumed_is_uninterrupted(load, tmp_path, changes, schedule):
    changes = {**changes, "optimizer__schedule__kind": schedule, "optimizer__schedule__warmup_steps": 3}
    if schedule == "step":
        changes["optimizer__schedule__every"] = 7
    whole = train(load(**changes), ranks=3, run_dir=tmp_path / "whole")
    reason, step = train_until_asked(load(**changes), 3, tmp_path / "parts", 8)
    assert reason == "the test says so"
    assert step == (15 if "method__average_every" in changes else 9)  # the next commit point
    resumed = train(load(**changes), ranks=3, resume=tmp_path / "parts")
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    without_clock(metrics(tmp_path / "parts"))


def test_what_was_recorded_before_a_run_goes_on_is_not_recorded_again(load, tmp_path):
    train(load(train__steps=12), run_dir=tmp_path / "run")
    before = metrics(tmp_path / "run")

    def run(comm):
        job = load(train__steps=18)
        directory = RunDirectory.create(comm, job.name, resume=tmp_path / "run")
        trainer = Trainer(job, comm, assemble(job, comm), directory)
        trainer.restore(checkpoint.load(checkpoint.latest(directory.checkpoints), comm))
        trainer.evaluate("test")
        assert metrics(tmp_path / "run") == before
        trainer.run()

    LocalWorld(2, timeout_s=PATIENCE_S).run(run)
    assert {step for _, step in without_clock(metrics(tmp_path / "run"))} == {4, 6, 8, 12, 16, 18}


def test_resuming_what_is_complete_changes_nothing(load, tmp_path):
    job = load(data__valid=0.2)
    first = train(job, run_dir=str(tmp_path / "run"))  # paths may be words, as everywhere in Python
    before = metrics(tmp_path / "run")
    again = train(job, resume=str(tmp_path / "run"))
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert metrics(tmp_path / "run") == before


def test_resuming_on_another_number_of_ranks(load, tmp_path):
    job = load(dtype="float64")
    whole = train(job, ranks=1, run_dir=tmp_path / "whole")
    train(load(dtype="float64", train__steps=12), ranks=3, run_dir=tmp_path / "parts")
    resumed = train(job, ranks=2, resume=tmp_path / "parts")
    assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-9)
    assert resumed["steps"] == 24


@pytest.mark.parametrize("phase", ["created", "data", "manifest", "renamed", "recorded", "pruned"])
def test_crashed_in_a_checkpoint_and_resumed_is_uninterrupted(load, tmp_path, phase):
    """By the third checkpoint the metrics are ahead of the second: what is done again must not be there twice."""
    whole = train(load(), ranks=1, run_dir=tmp_path / "whole")
    with pytest.raises(Crash):
        train(load(), ranks=1, run_dir=tmp_path / "run", on_phase=crash_at(phase, 3))
    assert max(record["step"] for record in metrics(tmp_path / "run")) == 18
    resumed = train(load(), ranks=1, resume=tmp_path / "run")
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert without_clock(metrics(tmp_path / "run")) == without_clock(metrics(tmp_path / "whole"))


def test_what_ended_early_is_not_trained_further_after_a_crash(load, tmp_path):
    """The last checkpoint is there, the result is not: the run must not go on beyond where it had stopped."""
    job = load(train__stop__patience=1, train__stop__min_delta=100.0)
    whole = train(job, ranks=1, run_dir=tmp_path / "whole")
    assert (whole["steps"], whole["stopped"]) == (12, "loss has not improved in 1 evaluations")
    with pytest.raises(Crash):
        train(job, ranks=1, run_dir=tmp_path / "run", on_phase=crash_at("pruned", 2))
    assert not (tmp_path / "run" / "result.json").exists()
    resumed = train(job, ranks=1, resume=tmp_path / "run")
    assert (resumed["steps"], resumed["stopped"]) == (12, whole["stopped"])
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    further = train(load(), ranks=1, resume=tmp_path / "run")  # without the reason to stop
    assert further["steps"] == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__hidden": [8]}, r"model.hidden = \(8,\)"),
        ({"optimizer__lr": 0.5}, "optimizer.lr = 0.5, the run has 0.01"),
        ({"train__steps": 48}, r"got train.steps = 48, the run has 24, which its cosine schedule runs over; resume "),
        ({"train__epochs": 3}, "got train.epochs = 3, the run has None; train.steps = None, the run has 24, which its"),
    ],
)
def test_resuming_with_another_job(load, tmp_path, changes, message):
    cosine = {"optimizer__schedule__kind": "cosine"}
    train(load(**cosine), run_dir=tmp_path / "run")
    kept = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    with pytest.raises(JobError, match=message):
        train(load(**cosine, **changes), ranks=1, resume=tmp_path / "run")
    assert kept == {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}


def test_a_run_past_the_end_of_a_job_is_refused_and_kept(tmp_path, load):
    run = tmp_path / "run"
    LocalWorld(1).run(lambda comm: train_job(load(train__steps=6), comm, run_dir=run))
    with pytest.raises(
        JobError, match=r"resume .*run: the run is past the end of the job; got step 6; expected at most .* 5 steps"
    ):
        LocalWorld(1).run(lambda comm: train_job(load(train__steps=5), comm, resume=run))
    assert json.loads((run / "result.json").read_text())["steps"] == 6
