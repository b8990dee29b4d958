from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpitrain._errors import JobError
from mpitrain.arrays import Batch
from mpitrain.nn.loss import Loss
from mpitrain.nn.losses import BinaryCrossEntropy, CrossEntropy, MeanSquaredError
from mpitrain.train.job import Job, job_reference
from mpitrain.train.job.train import lower_is_better

MINIMAL: dict[str, Any] = {
    "data": {"source": "digits"},
    "model": {"kind": "cnn"},
    "optimizer": {"kind": "adam"},
    "train": {"epochs": 2},
}

TOML = """
[data]
source = "digits"
[model]
kind = "cnn"
channels = [8]
[optimizer]
kind = "adam"
lr = 1
[train]
epochs = 2
"""

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_job(content: str | bytes) -> Path:
        path = tmp_path / "my job.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_job


def message(*overrides: str, text: str = TOML) -> str:
    with pytest.raises(JobError) as caught:
        Job.from_toml(text, "a.toml", overrides)
    return str(caught.value)


def test_a_minimal_job_has_sensible_defaults():
    job = Job.from_dict(MINIMAL)
    assert (job.name, job.seed, job.dtype, job.device) == ("job", 0, "float32", "cpu")
    assert job.model.arguments()["channels"] == (16, 32)
    assert job.model.loss == "cross_entropy"
    assert job.optimizer.lr == 0.001
    assert job.optimizer.schedule.kind == "constant"
    assert job.train.evaluate_every_epochs == job.train.checkpoint.every_epochs == 1


def test_an_integer_is_taken_where_a_number_is_meant(write: Write):
    job = Job.load(write(TOML))
    assert job.optimizer.lr == 1.0
    assert isinstance(job.optimizer.lr, float)
    assert job.name == "my job"


def test_the_resolved_file_says_every_default_and_loads_back_from_elsewhere(tmp_path: Path):
    tables = {
        **MINIMAL,
        "data": {"source": "csv", "path": "points.csv", "options": {"target": "y", "task": "regression"}},
        "model": {"build": "sub/my_model.py:build", "options": {"width": 3}, "loss": "my_loss.py:huber"},
        "train": {"steps": 9, "warm_start": "../runs/first", "stop": {"target": {"metric": "r2", "at_least": 1}}},
    }
    job = Job.from_dict(tables, tmp_path / "a.toml")
    assert job.data.arguments() == {"path": str(tmp_path / "points.csv"), "target": "y", "task": "regression"}
    assert job.model.build == f"{tmp_path}/sub/my_model.py:build"
    assert job.model.arguments() == {"width": 3}
    assert job.model.loss == f"{tmp_path}/my_loss.py:huber"
    assert job.train.warm_start == str(tmp_path / "../runs/first")
    assert 'name = "a"' in job.to_toml()
    assert Job.from_toml(job.to_toml(), "/elsewhere/b.toml") == job


def test_paths_among_the_options_start_at_the_job_file_too(tmp_path: Path):
    data = {"source": "npy", "options": {"inputs": "x.npy", "targets": "/y.npy"}}
    job = Job.from_dict({**MINIMAL, "data": data}, tmp_path / "a.toml")
    assert job.data.arguments() == {"inputs": str(tmp_path / "x.npy"), "targets": "/y.npy"}


def test_overrides_are_toml_values_or_else_strings(write: Write):
    overrides = ["optimizer.lr=0.5", "optimizer.kind=nesterov", "model.channels=[4, 5]", "data.options={flat=false}"]
    job = Job.load(write(TOML), [*overrides, "train.stop.patience = 7", "name=run 7"])
    assert (job.optimizer.kind, job.optimizer.lr) == ("nesterov", 0.5)
    assert job.model.arguments()["channels"] == (4, 5)
    assert job.train.stop.patience == 7
    assert job.name == "run 7"


def test_an_override_takes_the_place_of_what_it_excludes(write: Write):
    job = Job.load(write(TOML), ["train.steps=5"])
    assert (job.train.epochs, job.train.steps) == (None, 5)


@pytest.mark.parametrize("unit", ["steps", "epochs"])
@pytest.mark.parametrize("key", ["train.{}", "train.evaluate_every_{}", "train.checkpoint.every_{}"])
def test_an_override_takes_the_place_of_what_a_run_has_filled_in(key: str, unit: str):
    """The job file that a run keeps has every default."""
    other = {"steps": "epochs", "epochs": "steps"}[unit]
    kept = Job.from_toml(TOML, "a.toml", [f"{key.format(other)}=2"]).to_toml()
    job = Job.from_toml(kept, "run/job.toml", [f"{key.format(unit)}=5"])
    assert job == Job.from_toml(TOML, "a.toml", [f"{key.format(unit)}=5"])


def test_all_problems_are_listed_a_line_each():
    text = TOML.replace("lr = 1", "lr = '1'").replace("[data]", "sead = 1\n[data]")
    assert message("train.batch_size=0", "method.kind=[]", text=text).splitlines() == [
        'a.toml: optimizer.lr: is not a number; got "1"; expected number > 0',
        '--set: method.kind: is not one of the choices; got []; expected "data_parallel" or "gradient" or "pipeline"',
        '--set: train.batch_size: is not a batch size; got 0; expected integer ≥ 1 or "full"',
        "a.toml: sead: unknown key; expected one of name, seed, dtype, device, reproducible, lanes, data, model, "
        'optimizer, method, mesh, precision, train; did you mean "seed"?',
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lrr=1", 'did you mean "lr"?'),
        ("train.lr=1", 'did you mean "optimizer.lr"?'),
        ("optimizer.kind=Adamm", 'did you mean "adam"?'),
        ("dtype=float23", 'dtype: is not one of the choices; got "float23"; expected "float32" or "float64"'),
        ("model.loss=mes", 'did you mean "mse"?'),
        ("optimizer.kind=[1]", "optimizer.kind: is not one of the choices; got [1]"),
        ("optimizer={}", "optimizer.kind: is missing; expected one of"),
        ("optimizer=3", "optimizer: is not a table; got 3; expected a table"),
        ("model.channels=[1, 'a']", 'model.channels[1]: is not an integer; got "a"; expected array of (integer ≥ 1)'),
        ("model.channels=8", "model.channels: is not an array; got 8"),
        ("optimizer.lr=nan", "optimizer.lr: is not finite"),
        ("optimizer.lr=-1", "optimizer.lr: is too small; got -1; expected number > 0"),
        ("optimizer.lr=true", "optimizer.lr: is not a number; got true"),
        ("data.test=1", "data.test: is too large; got 1; expected number > 0 and < 1"),
        ("seed=99999999999999999999", "seed: is an integer beyond 64 bits"),
        ("seed=2020-01-01", "seed: is a date, which no key of a job takes"),
        ("name=a/b", 'name: has characters that are not allowed; got "a/b"; expected at most 100 letters'),
        ("name=", "name: has characters"),
        ("name=1\nseed=2", 'name: has characters that are not allowed; got "1\\nseed=2"'),
        ("data.options.flat=nan", "data.options.flat: is not finite"),
        ("data.path=x", 'data.path: is of no use with source = "digits"'),
        ("data.source=csv", 'data.path: is missing; expected a file, as source = "csv"'),
        ("data.source=text", "data.path: is missing"),
        ("data={source='npy', options={inputs='x'}}", "data.options.targets: is missing"),
        ("data.options.flatt=true", 'data.options.flatt: unknown option of source = "digits"; expected flat; did you'),
        ("data.build=x.py:f", "data.source: cannot go together with data.build"),
        ("data.build=x", 'data.build: does not name an object in a Python file; got "x"; expected "file.py:name"'),
        ("model.build=x.py:f", "model.build: unknown key"),
        ("data.sampling=importance", "data.weights: is missing"),
        ("data.weights=w.npy", 'data.weights: is of no use without sampling = "importance"'),
        ("data.partition=weighted", "data.partition_options.capacities: is missing"),
        ("data.partition_options.feature=1", "data.partition_options.feature: is of no use"),
        ("train.epochs=0", "train.epochs: is too small; got 0; expected integer ≥ 1"),
        ("train={}", "train.epochs: is missing; expected epochs or steps"),
        ("train={epochs=1, steps=1}", "train.steps: cannot go together with epochs; got 1; expected one of the two"),
        ("train.stop.wall_time_s=1e10", "train.stop.wall_time_s: is too large; got 10000000000.0; expected number > 0"),
        ("train.stop.target={metric='r2'}", "train.stop.target: has no value; expected at_least or at_most"),
        ("train.checkpoint={every_steps=1, every_epochs=1}", "train.checkpoint.every_steps: cannot go together"),
        ("optimizer.schedule.kind=step", "optimizer.schedule.every: is missing; expected integer ≥ 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        (
            "optimizer.betas=[0.9, 1]",
            "optimizer.betas[1]: is too large; got 1; expected array of 2 (number ≥ 0",
        ),
        ("data={source='digits', hold_out='end', folds=3}", "data.hold_out: cannot go together with folds or strat"),
        ("data={source='digits', hold_out='end', stratified=true}", "data.hold_out: cannot go together with folds"),
        ("data={source='tokens', path='a'}", "data.options.vocabulary_size: is missing"),
        ("data={source='pydoc', path='a'}", 'data.path: is of no use with source = "pydoc"'),
        ("model={kind='gpt', width=6}", "model.width: is not a multiple of heads; got 6; expected a multiple of 4"),
        ("model={kind='gpt', layer=2}", 'did you mean "layers"?'),
        ("model={kind='gpt', tied='no'}", 'model.tied: is neither true nor false; got "no"'),
        ("data.valid=0.8", "data.valid: leaves nothing to train on; got 0.8; expected less than 0.8"),
        ("repeatable=true", "repeatable: unknown key"),
    ],
)
def test_one_problem_is_named_with_its_key_and_what_is_allowed(override: str, expected: str):
    found = message(override)
    assert found.count("\n") == 0
    assert found.startswith(("--set: ", "a.toml: "))
    assert expected in found


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optimizer.kind=gd"], 'train.batch_size: does not fit optimizer.kind = "gd"; got 32; expected "full"'),
        (["model.loss=bce"], 'model.loss: needs 2 classes, data.source = "digits" has 10; got "bce"'),
        (["model.loss=mse"], 'model.loss: does not fit data.source = "digits", a classification; got "mse"'),
        (["data.source=wine"], 'model.kind: needs images, which data.source = "wine" does not give; got "cnn"'),
        (["data.options.flat=true"], "model.kind: needs images"),
        (["model={kind='bigram'}"], 'model.kind: does not fit data.source = "digits"; got "bigram"'),
        (["model={kind='gpt'}"], 'model.kind: does not fit data.source = "digits"; got "gpt"'),
        (
            ["data={source='pydoc'}"],
            'model.kind: does not fit data.source = "pydoc"; got "cnn"; expected "bigram", "gpt"',
        ),
        (["data={source='pydoc'}", "model={kind='gpt'}"], "data.options.context: is too small for model.kind"),
        (
            ["train.steps=5", "optimizer.schedule.warmup_steps=5"],
            "--set: optimizer.schedule.warmup_steps: leaves no step after the warm-up; got 5; expected less than "
            "train.steps = 5; set optimizer.schedule.warmup_steps=0, or train longer",
        ),
        (["method.microbatches=33"], "method.microbatches: is more than the samples of a batch; got 33"),
    ],
)
def test_sections_must_fit_together(overrides: list[str], expected: str):
    assert expected in message(*overrides)


def test_without_overrides_the_file_is_named():
    text = TOML.replace("lr = 1", "lr = 0")
    assert message(text=text) == "a.toml: optimizer.lr: is too small; got 0; expected number > 0"


@pytest.mark.parametrize("setting", ["x", "=1", "a..b=1", ".a=1", "optimizer.lr.x=1"])
def test_a_setting_that_cannot_be_understood_is_quoted(setting: str):
    assert f"--set {setting}: " in message(setting)


def test_a_file_that_cannot_be_read_is_named(write: Write, tmp_path: Path):
    path = write(TOML)
    for wrong, expected in (
        (tmp_path, "is a directory"),
        (tmp_path / "myjob.toml", 'no such file; expected a job file (TOML); did you mean "my job.toml"?'),
        (Path("a\0b.toml"), "no such file"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("/dev/null"), "no such file"),
    ):
        with pytest.raises(JobError) as caught:
            Job.load(wrong)
        assert expected in str(caught.value)
    assert path.exists()


def test_a_file_without_permission_is_named(write: Write, monkeypatch: pytest.MonkeyPatch):
    path = write(TOML)
    path.chmod(stat.S_IWUSR)

    def refuse(self: Path) -> bytes:  # root may read all files
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(JobError, match="cannot be read: Permission denied"):
        Job.load(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"seed = 1\nname = '\xff'", "is not text in UTF-8; got byte 0xff on line 2"),
        (b"[data]\nsource = digits", "is not TOML: Invalid value (at line 2, column 10)"),
        (b"x = " + b"[" * 5000, "is nested too deeply"),
        (b"seed = " + b"9" * 5000, "is not TOML"),
        (b"x = " + b"{a=" * 30 + b"1" + b"}" * 30, "is nested too deeply; expected at most 16 levels"),
    ],
)
def test_a_file_that_is_not_toml_is_named_with_the_place(write: Write, content: bytes, expected: str):
    path = write(content)
    with pytest.raises(JobError) as caught:
        Job.load(path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_job_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Job.from_dict(MINIMAL).seed = 3


def test_a_target_is_reached_from_its_own_side():
    def target(**values: Any) -> Any:
        return Job.from_dict({**MINIMAL, "train": {"epochs": 1, "stop": {"target": values}}}).train.stop.target

    assert target(metric="accuracy", at_least=0.9).reached({"accuracy": 0.9})
    assert not target(metric="accuracy", at_least=0.9).reached({"accuracy": 0.89})
    assert target(metric="loss", at_most=0.1).reached({"loss": 0.1})
    assert not target(metric="loss", at_most=0.1).reached({"loss": 0.11})


LOWER = {"loss", "rmse", "bits_per_token"}
HIGHER = {"accuracy", "r2"}


def test_losses_errors_and_bits_are_better_when_lower():
    assert all(lower_is_better(name) for name in (*LOWER, "absolute_error", "mse", "mae", "perplexity"))
    assert not any(lower_is_better(name) for name in HIGHER)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (CrossEntropy(unit="token"), np.array([0, 1, 1])),
        (BinaryCrossEntropy(), np.array([0, 1, 1])),
        (MeanSquaredError(), np.array([[0.0, 1.0], [1.0, 2.0], [2.0, 5.0]])),
    ],
)
def test_of_every_metric_of_our_losses_it_is_known_which_way_is_better(loss: Loss, targets: Any):
    outputs = np.zeros((3, 1 if isinstance(loss, BinaryCrossEntropy) else 2))
    given = loss.metrics(loss.sums(outputs, Batch(outputs, targets, np.arange(3))))
    numbers = {name for name, value in given.items() if np.ndim(value) == 0}
    assert {"loss"} < numbers <= LOWER | HIGHER


def test_the_reference_describes_every_key():
    rows = [line.split(" | ") for line in job_reference().splitlines() if line.startswith("| `")]
    keys = {row[0].strip("| `") for row in rows}
    assert {"seed", "source", "channels", "betas", "warmup_steps", "average_every", "keep", "at_least"} <= keys
    assert all(len(row) == 4 and len(row[3]) > len("x. |") for row in rows)
    assert "| `lr` | number > 0 | `0.05` | Learning rate. |" in job_reference()
