"""What a user can get wrong: each ends in one clear line from one rank, soon, and with the right exit code."""

import shutil
import textwrap

import numpy as np
import pytest
from click.testing import CliRunner
from commands import JOB, mpitrain, settings, write_data, write_job

from mpitrain.cli import cli

SECONDS = 30.0
"""Far more than it takes, for machines that are busy; a hang is far longer."""

HOW = {"1": ((), 0), "-n 2": (("-n", "2"), 0), "-n 3": (("-n", "3"), 0), "mpiexec": ((), 2)}
"""The ways of starting a run: arguments, and ranks of a plain mpiexec."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A job, its data, and a finished run of it in ``run``."""
    folder = tmp_path_factory.mktemp("errors")
    job = write_job(folder)
    assert mpitrain("run", job, "--quiet", "--run-dir", folder / "run").code == 0
    return folder


def run(way, job, *arguments, cwd):
    ranks, under = HOW[way]
    return mpitrain("run", *ranks, job, "--quiet", *arguments, under=under, cwd=cwd)


def check_complaint(done, way, *parts, code=2, then=""):
    """Check that one line complains, says these parts, and is there once, before ``then``; returns it."""
    complaints = [line for line in done.err.splitlines() if "error:" in line]
    assert len(complaints) == 1, done.err
    (line,) = complaints
    assert line.startswith("mpitrain: error: ")
    for part in parts:
        assert part in line, f"{part!r} is not in {line!r}"
    assert "Traceback" not in done.err
    assert done.out == ""
    assert done.code == code
    assert done.seconds < SECONDS
    if way != "mpiexec":  # whose own comment on the exit code nobody can help
        assert done.err == f"{line}\n{then}"
    return line


@pytest.mark.parametrize(
    ("way", "overrides", "parts"),
    [
        ("1", {"optimizer__lr": "fast"}, ["optimizer.lr", '"fast"']),
        ("-n 2", {"optimizer__learning_rate": 0.1}, ["unknown key", "optimizer.learning_rate"]),
        ("mpiexec", {"optimizer__kind": "adamm"}, ["optimizer.kind", "adamm", 'did you mean "adam"?']),
        ("-n 2", {"data__path": "none.npz"}, ["none.npz: no such file"]),
        ("mpiexec", {"data__path": "cut.npz"}, ["cut.npz: cannot be read"]),
        ("-n 2", {"data__path": "negative.npz"}, ["negative.npz: row 7", "label out of range; got -1"]),
        ("-n 2", {"train__batch_size": 1}, ["got batch_size 1, 2 ranks", "set batch_size to 2 or more"]),
        (
            "-n 3",
            {"data__path": "tiny.npz", "data__stratified": False},
            ["more ranks than samples; got 3 ranks, 2 samples"],
        ),
        ("1", {"train__batch_size": 1000}, ["got batch_size 1000 with 96 rows"]),
        ("1", {"train__checkpoint__best": "r2"}, ["train.checkpoint.best", "got r2", "accuracy or loss"]),
        ("1", {"train__stop__patience": 2, "train__stop__metric": "acuracy"}, ["train.stop.metric", "got acuracy"]),
        ("1", {"train__warm_start": "nowhere"}, ["train.warm_start", "nowhere: holds no checkpoint"]),
        ("1", {"train__warm_start": "run", "model__hidden": [9]}, ["another model", "(5, 12), not (5, 9)"]),
    ],
)
def test_in_the_job(folder, way, overrides, parts):
    path = write_data(folder)
    (folder / "cut.npz").write_bytes(path.read_bytes()[:2000])
    labels = np.arange(30) % 3
    np.savez(folder / "negative.npz", inputs=np.ones((30, 5)), targets=np.where(np.arange(30) == 7, -1, labels))
    np.savez(folder / "tiny.npz", inputs=np.ones((3, 5)), targets=[0, 1, 1])
    done = run(way, "job.toml", *settings(**overrides), cwd=folder)
    check_complaint(done, way, *parts)
    assert not (folder / "runs").exists()  # nothing is left of a run that never began


def test_nan_in_a_table(folder):
    rows = ["a,b,c,label", *[f"{i},{i % 5},{i % 7},{i % 2}" for i in range(40)]]
    rows[12] = "11,nan,4,1"
    (folder / "table.csv").write_text("\n".join(rows))
    (folder / "csv.toml").write_text(JOB.replace("npz", "csv").replace("data.csv", "table.csv"))
    done = run("-n 2", "csv.toml", cwd=folder)
    check_complaint(done, "-n 2", "table.csv: row 11", "'b' is not finite", "got nan")


@pytest.mark.parametrize("way", ["1", "-n 2", "mpiexec"])
def test_no_job_file(tmp_path, way):
    (tmp_path / "job.toml").write_text(JOB)
    check_complaint(run(way, "jop.toml", cwd=tmp_path), way, "jop.toml: no such file", 'did you mean "job.toml"?')


@pytest.mark.parametrize("job", ["digits_cnn", "jobs/digits_cnn.toml"])
def test_a_shipped_job_that_is_not_here(tmp_path, job):
    remedy = "to copy the one that is shipped: mpitrain init digits_cnn"
    check_complaint(run("1", job, cwd=tmp_path), "1", f"{job}: no such file", remedy)
    assert not any(tmp_path.iterdir())


def test_a_script_in_place_of_a_job(tmp_path):
    (tmp_path / "mine.py").write_text("print('hello')\n")
    line = check_complaint(run("-n 2", "mine.py", cwd=tmp_path), "-n 2", "mine.py: is a Python script")
    assert line.endswith("start it with: mpirun -n 2 python mine.py")


@pytest.mark.parametrize("arguments", [("--resume", "a", "--run-dir", "b"), ("--no-such-option",)])
def test_wrong_options_are_told_once(tmp_path, arguments):
    done = mpitrain("run", "job.toml", *arguments, under=2, cwd=tmp_path)
    assert done.code == 2
    assert done.err.count("Error: ") == 1


@pytest.mark.parametrize(
    ("word", "complaint"),
    [("verfy", "No such command 'verfy'. did you mean \"verify\"?"), ("xyz", "No such command 'xyz'.")],
)
def test_a_command_that_is_not_there(word, complaint):
    done = CliRunner().invoke(cli, [word, "job.toml"])
    assert done.exit_code == 2
    assert done.output.splitlines()[-1] == f"Error: {complaint}"


def test_n_within_a_launch(tmp_path):
    done = mpitrain("run", "-n", "2", "job.toml", under=2, cwd=tmp_path)
    check_complaint(done, "mpiexec", "a launcher has already started some", "leave out -n")


@pytest.mark.parametrize(
    ("way", "target", "code", "part"),
    [
        ("1", "run", 2, "run directory is not empty; resume the run that is in it, or choose another directory"),
        ("-n 2", "job.toml", 1, "File exists"),
        ("1", "job.toml/below", 1, "Not a directory"),
    ],
)
def test_run_directories_that_cannot_be_used(folder, way, target, code, part):
    check_complaint(run(way, "job.toml", "--run-dir", target, cwd=folder), way, target, part, code=code)


@pytest.fixture
def damaged(folder, tmp_path):
    """A folder with a copy of the finished run, to be damaged."""
    shutil.copytree(folder / "run", tmp_path / "run")
    return tmp_path


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("way", "harm", "file", "part"),
    [
        ("1", _truncate, "rank-00000.bin", "truncated"),
        ("-n 2", _flip, "rank-00000.bin", "damaged, checksum differs"),
        ("1", _flip, "manifest.json", "manifest.json"),
    ],
)
def test_resuming_from_a_damaged_checkpoint(folder, damaged, way, harm, file, part):
    job, checkpoints = folder / "job.toml", damaged / "run" / "checkpoints"
    newest = checkpoints / "step-00000024"
    harm(newest / file)
    before = {path: path.read_bytes() for path in sorted((damaged / "run").rglob("*")) if path.is_file()}
    done = run(way, job, "--resume", "run", cwd=damaged)
    line = check_complaint(done, way, part, "step-00000024")
    assert f"remove {newest} to go on from step-00000018, which is whole" in line
    assert before == {path: path.read_bytes() for path in sorted((damaged / "run").rglob("*")) if path.is_file()}
    shutil.rmtree(newest)  # the remedy
    assert run("1", job, "--resume", "run", cwd=damaged).code == 0


@pytest.mark.parametrize(
    ("way", "overrides", "parts"),
    [
        ("mpiexec", {"model__hidden": [8]}, ["model.hidden = (8,), the run has (12,)"]),
        ("1", {"optimizer__lr": 0.5, "seed": 3}, ["optimizer.lr = 0.5, the run has 0.01", "seed = 3"]),
    ],
)
def test_resuming_with_another_job(folder, way, overrides, parts):
    done = run(way, "job.toml", "--resume", "run", *settings(**overrides), cwd=folder)
    check_complaint(done, way, "not the one that the run was started with", *parts, "run/job.toml")


@pytest.mark.parametrize("way", ["1", "mpiexec"])
def test_resuming_what_is_no_run(folder, way):
    done = run(way, "job.toml", "--resume", "nowhere", cwd=folder)
    check_complaint(done, way, "nowhere: holds no run", "job.toml")


MODEL = textwrap.dedent("""
    import resource
    from pathlib import Path

    import mpitrain
    from mpitrain import nn


    class Model(nn.Network):
        def __init__(self, what, at, limit):
            super().__init__(nn.Linear(5, 3), nn.CrossEntropy())
            self.what, self.at, self.limit, self.calls = what, at, limit, 0

        def loss_and_gradients(self, params, batch, grads, rng, reduce=None):
            self.calls += 1
            if self.calls == self.at:
                comm = mpitrain.world()
                if self.what == "raise" and comm.rank == comm.size - 1:
                    raise RuntimeError("the user's own mistake")
                if self.what == "exit" and comm.rank == comm.size - 1:
                    raise SystemExit(0)
                if self.what == "nothing":
                    return None
                if self.what == "nan":
                    return float("nan"), 16.0
                if self.what == "full":  # what a full disk is to a file that grows
                    resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))
            return super().loss_and_gradients(params, batch, grads, rng, reduce)


    def build(what="", at=6, limit=200):
        return Model(what, at, limit)


    def number():
        return 5


    def narrow():
        return nn.Linear(5, 2)


    def wide():
        return nn.Linear(7, 3)
""")


@pytest.fixture
def own(tmp_path):
    """A job with a model of the user's own."""
    (tmp_path / "model.py").write_text(MODEL)
    head, _, tail = JOB.partition('kind = "mlp"')
    text = head + 'build = "model.py:build"\n' + tail.partition("dropout = 0.2\n")[2]
    return write_job(tmp_path, text)


@pytest.mark.parametrize(
    ("way", "overrides", "code", "parts"),
    [
        ("-n 2", {"what": "nothing"}, 2, ["loss_and_gradients gave no loss", "got None", "two numbers"]),
        ("-n 2", {"what": "nan"}, 1, ["the loss or gradient of step 6 is not finite", "lower optimizer.lr"]),
        ("-n 2", {"what": "full"}, 1, ["append metrics", "metrics.jsonl: disk is full"]),
        ("1", {"build": "model.py:number"}, 2, ["model.build gave no model", "got int"]),
        ("1", {"build": "model.py:narrow"}, 2, ["label", "out of range; got 2", "2 outputs"]),
        ("mpiexec", {"build": "model.py:wide"}, 2, ["Linear: the input does not fit", "(n, …, 7)"]),
        ("1", {"build": "model.py:biuld"}, 2, ['there is no "biuld"', 'did you mean "build"?']),
        ("1", {"who": "me"}, 2, ["model.py:build: cannot be called with the job's options", "'who'"]),
    ],
)
def test_in_the_users_own_model(own, way, overrides, code, parts):
    options = (
        {"build": overrides["build"]} if "build" in overrides else {f"options__{k}": v for k, v in overrides.items()}
    )
    done = run(way, own, *settings(**{f"model__{key}": value for key, value in options.items()}), cwd=own.parent)
    check_complaint(done, way, *parts, code=code)


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        ("raise", "RuntimeError: the user's own mistake"),
        pytest.param("exit", "SystemExit: 0", marks=pytest.mark.slow),
    ],
)
def test_an_exception_on_one_rank_ends_all(own, what, cause):
    done = run("-n 2", own, *settings(model__options__what=what), cwd=own.parent)
    assert done.code == 1
    assert done.seconds < SECONDS
    assert f"[rank 1 of 2] {cause}\n" in done.err
    assert done.err.count(cause) == 1
    assert "model.py" in done.err  # the traceback leads there
    assert "[rank 0 of 2]" not in done.err


def test_the_disk_fills_up_in_a_checkpoint(own):
    """The earlier checkpoints are as they were, nothing half-written is left, and the run can go on."""
    quiet = settings(
        model__options__what="full", model__options__at=13, model__options__limit=512, train__log_every_steps=100
    )
    rare = settings(train__evaluate_every_steps=100)
    done = run("-n 2", own, *quiet, *rare, "--run-dir", "run", cwd=own.parent)
    kept = own.parent / "run"
    then = f"go on     mpitrain run -n 2 {kept}/job.toml --resume {kept}\n"
    check_complaint(done, "-n 2", "write checkpoint", "File too large", "free some space", code=1, then=then)
    checkpoints = kept / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000006", "step-00000012"}
