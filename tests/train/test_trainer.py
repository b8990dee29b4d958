"""The trainer on ranks that are threads: exact resumption, early stops, warm starts, the best checkpoint."""

import errno
import json
import signal
import time
import tomllib
from dataclasses import asdict

import numpy as np
import pytest
from commands import metrics, write_data, write_job

from mpitrain._errors import CheckpointError, DataError, InputError, JobError, MismatchError, PeerError, StorageError
from mpitrain.comm import LocalWorld
from mpitrain.comm.local import alone as alone_comm
from mpitrain.train import Job, Observer, checkpoint, session, train_job
from mpitrain.train.assembly import assemble
from mpitrain.train.predictor import Predictor
from mpitrain.train.rundir import RunDirectory
from mpitrain.train.storage import alone
from mpitrain.train.trainer import Trainer

PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """The report has tests of its own, and pictures take long."""
    monkeypatch.setattr(session, "write_report", lambda path: path / "report.html")


@pytest.fixture
def job_file(tmp_path):
    return write_job(tmp_path)


@pytest.fixture
def load(job_file):
    """Return a function that loads the job with changes: ``load(train__steps=3)``."""

    def load(**changes):
        text = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
        return Job.load(job_file, text)

    return load


def train(job, ranks=2, **options):
    """Run a job on threads; return rank 0's result, which all have."""
    results = LocalWorld(ranks, timeout_s=PATIENCE_S).run(lambda comm: train_job(job, comm, **options))
    assert all(result == results[0] for result in results)
    return results[0]


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


def without_clock(records):
    """Return the losses and metrics by kind and step, of which there is one each."""
    clock = ("seconds", "samples_per_s")
    found = {(r["kind"], r["step"]): {k: v for k, v in r.items() if k not in clock} for r in records}
    assert len(found) == len(records), "a step is there twice"
    return found


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


def test_resuming_on_another_number_of_ranks(load, tmp_path):
    job = load(dtype="float64")
    whole = train(job, ranks=1, run_dir=tmp_path / "whole")
    train(load(dtype="float64", train__steps=12), ranks=3, run_dir=tmp_path / "parts")
    resumed = train(job, ranks=2, resume=tmp_path / "parts")
    assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-9)
    assert resumed["steps"] == 24


class Crash(BaseException):
    """Ends a rank as a kill does: nothing may catch it and tidy up."""


def crash_at(phase, occurrence):
    """Return an ``on_phase`` that crashes at some phase of a checkpoint."""
    told = []

    def on_phase(found):
        told.append(found)
        if told.count(phase) == occurrence:
            raise Crash

    return on_phase


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


def test_a_warm_start_is_not_lost_in_a_crash(load, tmp_path):
    train(load(seed=5), run_dir=tmp_path / "first")
    job = load(train__warm_start=str(tmp_path / "first"))
    whole = train(job, run_dir=tmp_path / "whole")
    cold = train(load(), run_dir=tmp_path / "cold")
    assert whole["weights_sha256"] != cold["weights_sha256"]
    with pytest.raises(Crash):
        train(job, ranks=1, run_dir=tmp_path / "run", on_phase=crash_at("created", 1))
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is None
    assert train(job, resume=tmp_path / "run")["weights_sha256"] == whole["weights_sha256"]


def test_a_warm_start_takes_the_best_weights_and_nothing_else(load, tmp_path):
    train(load(), run_dir=tmp_path / "first")
    directory = tmp_path / "first" / "checkpoints"
    best = checkpoint.load(checkpoint.best(directory))

    def first_parameters(comm):
        job = load(train__warm_start=str(tmp_path / "first"), train__steps=1)
        parts = assemble(job, comm)
        session._warm_start(parts, tmp_path / "first", comm)
        state = {slot: float(abs(array).max()) for slot, array in parts.method.optimizer_state.items()}
        return parts.method.step, state, {name: view.copy() for name, view in parts.method.params.views.items()}

    for step, state, views in LocalWorld(2).run(first_parameters):
        assert step == 0
        assert set(state.values()) == {0.0}
        for name, view in views.items():
            np.testing.assert_array_equal(view, best.read(f"params/{name}"))


def test_a_warm_start_from_another_model(load, tmp_path):
    train(load(model__hidden=[7]), run_dir=tmp_path / "first")
    job = load(train__warm_start=str(tmp_path / "first"))
    with pytest.raises(CheckpointError, match=r"another model: .*\(5, 7\), not \(5, 12\)"):
        train(job, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_target(load, tmp_path):
    whole = train(load(), run_dir=tmp_path / "whole")
    losses = [(r["step"], r["loss"]) for r in metrics(tmp_path / "whole") if r["kind"] == "test"]
    bound = losses[1][1]
    stopped = train(
        load(train__stop__target__metric="loss", train__stop__target__at_most=bound),
        run_dir=tmp_path / "run",
    )
    expected = next(step for step, loss in losses if loss <= bound)
    assert (stopped["steps"], stopped["stopped"], stopped["completed"]) == (expected, "loss reached its target", True)
    assert stopped["steps"] < whole["steps"]


def test_patience_counts_from_the_best(load, tmp_path):
    changes = {"optimizer__lr": 1e-30, "model__batch_norm": False, "train__steps": 60}  # nothing moves
    stopped = train(load(**changes, train__stop__patience=3), run_dir=tmp_path / "run")
    assert stopped["stopped"] == "loss has not improved in 3 evaluations"
    assert stopped["steps"] == 24  # the first evaluation is the best, three more are not


def test_patience_begins_anew_with_another_metric(load, tmp_path):
    """An accuracy, 0 to 1, is no bound for a loss, which is negated so that larger is better."""
    still = {"optimizer__lr": 1e-30, "model__batch_norm": False}  # nothing moves
    accuracy, loss = ({**still, "train__stop__metric": metric} for metric in ("accuracy", "loss"))
    train(load(**accuracy, train__steps=12), ranks=1, run_dir=tmp_path / "run")  # one evaluation after the best
    resumed = train(load(**loss, train__steps=60, train__stop__patience=2), ranks=1, resume=tmp_path / "run")
    assert resumed["stopped"] == "loss has not improved in 2 evaluations"
    assert resumed["steps"] == 30  # the first evaluation of the loss, at 18, is the best, two more are not


def test_a_checkpoint_that_does_not_say_what_was_watched_is_gone_on_from(load, tmp_path, monkeypatch):
    """As checkpoints were written once: the best value is taken for that of the job's metric."""
    still = {"optimizer__lr": 1e-30, "model__batch_norm": False, "train__stop__patience": 3}
    monkeypatch.setattr("mpitrain.train.trainer.asdict", lambda standing: without(asdict(standing), "metric"))
    train(load(**still, train__steps=12), ranks=1, run_dir=tmp_path / "run")
    newest = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    assert newest.scalars["standing"]["stale"] == 1
    assert "metric" not in newest.scalars["standing"]
    assert train(load(**still, train__steps=60), ranks=1, resume=tmp_path / "run")["steps"] == 24


def without(mapping, key):
    return {name: value for name, value in mapping.items() if name != key}


def test_wall_time(load, tmp_path):
    began = time.monotonic()
    job = load(train__steps=10**6, train__checkpoint__every_steps=10**6, train__stop__wall_time_s=0.5)
    stopped = train(job, run_dir=tmp_path / "run")
    assert stopped["stopped"] == "wall time of 0.5 s is over"
    assert not stopped["completed"]
    assert not (tmp_path / "run" / "COMPLETED").exists()
    assert 0.5 < time.monotonic() - began < 10
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == f"step-{stopped['steps']:08d}"


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
        ({"optimizer__schedule__warmup_steps": 5, "train__epochs": 1, "train__batch_size": 96}, "warmup_steps"),
    ],
)
def test_what_does_not_fit_is_refused_on_all_ranks(load, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train(load(**changes), ranks=3, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__hidden": [8]}, r"model.hidden = \(8,\)"),
        ({"optimizer__lr": 0.5}, "optimizer.lr = 0.5, the run has 0.01"),
    ],
)
def test_resuming_with_another_job(load, tmp_path, changes, message):
    train(load(), run_dir=tmp_path / "run")
    kept = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    with pytest.raises(JobError, match=message):
        train(load(**changes), ranks=1, resume=tmp_path / "run")
    assert kept == {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}


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


def test_a_run_past_the_end_of_a_job_is_refused_and_kept(tmp_path, load):
    run = tmp_path / "run"
    LocalWorld(1).run(lambda comm: train_job(load(train__steps=6), comm, run_dir=run))
    with pytest.raises(
        JobError, match=r"resume .*run: the run is past the end of the job; got step 6; expected at most .* 5 steps"
    ):
        LocalWorld(1).run(lambda comm: train_job(load(train__steps=5), comm, resume=run))
    assert json.loads((run / "result.json").read_text())["steps"] == 6


def test_other_data_under_the_same_name_are_refused(tmp_path, load):
    LocalWorld(1).run(lambda comm: train_job(load(train__steps=6), comm, run_dir=tmp_path / "run"))
    write_data(tmp_path, rows=121)
    with pytest.raises(JobError, match="the data are not those that the run was started with"):
        LocalWorld(1).run(lambda comm: train_job(load(train__steps=6), comm, resume=tmp_path / "run"))


def test_npy_files_may_lie_elsewhere_as_long_as_they_are_the_same(tmp_path, job_file):
    def job(folder, steps=6):
        files = f'inputs = "{folder}/x.npy"\ntargets = "{folder}/y.npy"'
        text = job_file.read_text().replace('source = "npz"\npath = "data.npz"', 'source = "npy"')
        return Job.from_toml(f"{text}\n[data.options]\n{files}", job_file, [f"train.steps={steps}"])

    with np.load(tmp_path / "data.npz") as data:
        for folder, inputs in (("a", data["inputs"]), ("moved", data["inputs"]), ("other", data["inputs"] + 1)):
            (tmp_path / folder).mkdir()
            np.save(tmp_path / folder / "x.npy", inputs)
            np.save(tmp_path / folder / "y.npy", data["targets"])
    train(job("a"), ranks=1, run_dir=tmp_path / "run")
    assert train(job("moved", 8), ranks=1, resume=tmp_path / "run")["steps"] == 8
    with pytest.raises(JobError, match="the data are not those that the run was started with"):
        train(job("other", 8), ranks=1, resume=tmp_path / "run")


@pytest.mark.parametrize("drawn", ["::2", "-3:"], ids=["train", "held out"])
def test_ranks_that_read_different_data_are_told(tmp_path, job_file, drawn):
    """As two nodes with a file each of their own do; here each rank draws its rows anew."""
    (tmp_path / "drawn.py").write_text(
        "import numpy as np\nfrom mpitrain import Dataset\n\n"
        "def build():\n"
        "    inputs = np.random.default_rng(3).normal(size=(96, 5)).astype(np.float32)\n"
        f"    inputs[{drawn}] = np.random.default_rng().normal(size=inputs[{drawn}].shape)\n"
        '    return Dataset(inputs, np.arange(96) % 2, "classification", "drawn")\n'
    )
    text = job_file.read_text().replace('source = "npz"\npath = "data.npz"', 'build = "drawn.py:build"')
    job = Job.from_toml(text, job_file, ['data.hold_out="end"'])
    said = r"train \w{12}, test \w{12}"
    with pytest.raises(MismatchError, match=rf"^data: ranks have read different data; got {said} on rank 1; expected"):
        train(job, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def drawing(load, weights, first=1.0, steps=6):
    """Return the job that draws its rows by weights, which it writes: ones, but for the first row's."""
    np.save(weights, np.r_[first, np.ones(95)])
    return load(train__steps=steps, data__sampling="importance", data__weights=str(weights))


def test_ranks_that_read_different_weights_are_told(tmp_path, load):
    jobs = [drawing(load, tmp_path / f"{rank}.npy", first=rank + 1.0) for rank in range(2)]
    said = r"train \w{12}, test \w{12}, weights \w{12}"
    with pytest.raises(MismatchError, match=rf"^data: ranks have read different data; got {said} on rank 1; expected"):
        LocalWorld(2).run(lambda comm: train_job(jobs[comm.rank], comm, run_dir=tmp_path / "run"))


def test_a_run_goes_on_with_its_own_weights_only(tmp_path, load):
    weights, run = tmp_path / "w.npy", tmp_path / "run"
    train(drawing(load, weights), ranks=1, run_dir=run)
    other = drawing(load, weights, first=5.0, steps=7)
    with pytest.raises(JobError, match=r"data are not those that .*; got others for weights; restore them"):
        train(other, ranks=1, resume=run)
    assert train(drawing(load, tmp_path / "moved.npy", steps=7), resume=run)["steps"] == 7
    facts = json.loads((run / "data.json").read_text())
    del facts["also_read"]["weights"]
    (run / "data.json").write_text(json.dumps(facts))  # as if it had drawn without any
    with pytest.raises(JobError, match="got others for weights"):
        train(drawing(load, weights, steps=8), ranks=1, resume=run)


def test_a_run_goes_on_with_its_own_held_out_rows_only(tmp_path, load):
    def job(steps):
        return load(train__steps=steps, data__hold_out="end", data__valid=0.1)

    run = tmp_path / "run"
    train(job(6), ranks=1, run_dir=run)
    with np.load(tmp_path / "data.npz") as data:
        targets = data["targets"]
        targets[-1] = (targets[-1] + 1) % 3
        np.savez(tmp_path / "data.npz", inputs=data["inputs"], targets=targets)
    with pytest.raises(JobError, match=r"data are not those that .*; got others for test; restore them"):
        train(job(7), ranks=1, resume=run)
    facts = json.loads((run / "data.json").read_text())
    assert facts.pop("also_read").keys() == {"valid", "test"}
    (run / "data.json").write_text(json.dumps(facts))  # as runs were before these were kept
    assert train(job(7), ranks=1, resume=run)["steps"] == 7


def test_weights_are_one_array(tmp_path, load):
    np.savez(tmp_path / "w.npz", np.ones(96))
    job = load(data__sampling="importance", data__weights=str(tmp_path / "w.npz"))
    with pytest.raises(DataError, match=r"w.npz: cannot be read; got .*; expected a .npy file"):
        train(job, ranks=1, run_dir=tmp_path / "run")


class Twice(Observer):
    """Sends this process SIGUSR1 as soon as a step is recorded, and again when training has ended."""

    def on_metrics(self, record):
        if record["kind"] == "train" and record["step"] == 8:
            signal.raise_signal(signal.SIGUSR1)

    def on_end(self):
        signal.raise_signal(signal.SIGUSR1)


def test_a_second_signal_does_not_cut_off_the_end(load, tmp_path):
    """Launchers may send SIGUSR1 twice; outside of training it interrupts, as `mpitrain run` sets it."""

    def interrupt(number, frame):
        raise AssertionError("interrupted")

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        result = train_job(load(), alone_comm(), run_dir=tmp_path / "run", observer=Twice())
        assert signal.getsignal(signal.SIGUSR1) is interrupt
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (result["stopped"], result["completed"]) == ("stopped by SIGUSR1", False)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
