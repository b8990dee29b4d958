"""``mpitrain run`` on one rank, on several, and under a plain mpiexec: what it prints, writes and returns."""

import json
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from commands import metrics, mpitrain, settings, write_job
from rich.console import Console

from mpitrain.cli.display import Lines
from mpitrain.comm.local import alone
from mpitrain.train import Job, train_job

KEYS = {
    "job", "ranks", "steps", "seconds", "loss", "metrics", "weights_sha256", "run_dir", "report", "stopped",
    "completed", "confusion", "classes",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same job in every way of starting it: its folder, and what each way ended with."""
    folder = tmp_path_factory.mktemp("runs")
    job = write_job(folder)
    fixed = [*settings(dtype="float64", optimizer__lr=0.02), "--json", "--quiet"]
    return folder, {
        "1": mpitrain("run", job, *fixed, "--run-dir", folder / "1"),
        "-n 2": mpitrain("run", "-n", "2", job, *fixed, "--run-dir", folder / "-n 2"),
        "-n 3": mpitrain("run", "-n", "3", job, *fixed, "--run-dir", folder / "-n 3"),
        "mpiexec -n 2": mpitrain("run", job, *fixed, "--run-dir", folder / "mpiexec -n 2", under=2),
    }


WAYS = {"1": 1, "-n 2": 2, "-n 3": 3, "mpiexec -n 2": 2}


@pytest.mark.parametrize(("way", "ranks"), WAYS.items())
def test_ends_with_one_json_object(runs, way, ranks):
    folder, ended = runs
    done = ended[way]
    assert done.code == 0, done.err
    assert done.out.count("\n") == 1  # and nothing else on standard output
    assert done.result.keys() == KEYS
    assert done.result["job"] == "job"
    assert done.result["ranks"] == ranks
    assert done.result["steps"] == 24
    assert done.result["stopped"] == "all 24 steps done"
    assert done.result["completed"] is True
    assert done.result["metrics"].keys() == {"test_loss", "test_accuracy"}
    assert Path(done.result["run_dir"]) == folder / way
    assert done.err == ""  # --quiet


@pytest.mark.parametrize("way", WAYS)
def test_keeps_the_run(runs, way):
    folder, ended = runs
    run = folder / way
    names = {path.name for path in run.iterdir()}
    assert names >= {"job.toml", "environment.json", "data.json", "metrics.jsonl", "checkpoints", "report.html"}
    assert names >= {"result.json", "COMPLETED", "loss.png", "accuracy.png", "confusion.png", "throughput.png"}
    assert json.loads((run / "result.json").read_text()) == ended[way].result
    assert "lr = 0.02" in (run / "job.toml").read_text()  # as --set said
    assert json.loads((run / "environment.json").read_text())["ranks"] == WAYS[way]
    assert not [name for name in names if name.startswith(".")]
    steps = {kind: [r["step"] for r in metrics(run) if r["kind"] == kind] for kind in ("train", "test")}
    assert steps == {"train": [4, 6, 8, 12, 16, 18, 20, 24], "test": [6, 12, 18, 24]}


@pytest.mark.parametrize("way", ["-n 2", "-n 3", "mpiexec -n 2"])
def test_the_result_is_that_of_one_rank(runs, way):
    folder, ended = runs
    for one, many in zip(metrics(folder / "1"), metrics(folder / way), strict=True):
        assert (one["kind"], one["step"]) == (many["kind"], many["step"])
        for key in one.keys() - {"kind", "seconds", "samples_per_s"}:
            assert many[key] == pytest.approx(one[key], rel=1e-9), key
    assert ended[way].result["confusion"] == ended["1"].result["confusion"]
    assert ended["mpiexec -n 2"].result["weights_sha256"] == ended["-n 2"].result["weights_sha256"]


def test_the_confusion_matrix_counts_the_test_part(runs):
    result = runs[1]["-n 3"].result
    confusion = np.array(result["confusion"])
    assert confusion.sum() == 24  # a fifth of the samples
    assert np.trace(confusion) / 24 == pytest.approx(result["metrics"]["test_accuracy"])


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    done = mpitrain("run", "-n", "2", write_job(tmp_path), *settings(train__steps=8), cwd=tmp_path)
    assert done.code == 0, done.err
    lines = done.err.splitlines()
    assert lines[0].endswith("96 samples, batches of 16, 8 steps on 2 ranks")
    assert [line.split()[1] for line in lines[2:]] == ["4/8", "6/8", "6/8", "8/8", "8/8"]
    assert "\x1b" not in done.err
    first, accuracy, weights, report = done.out.splitlines()
    assert first.startswith("job: 8 steps on 2 ranks in ")
    assert "test_accuracy" in accuracy
    assert len(weights.split()[1]) == 64
    page = Path(report.split()[1])
    assert page.is_file()
    assert page.parent.parent == tmp_path / "runs" / "job"  # the default
    assert lines[1] == f"kept in   {page.parent}"


def test_report_can_be_written_again(runs):
    folder, _ = runs
    page = folder / "1" / "report.html"
    before = page.read_bytes()
    page.unlink()
    done = mpitrain("report", folder / "1")
    assert (done.code, done.out) == (0, f"{page}\n")
    assert page.read_bytes() == before


def test_a_report_needs_a_run(tmp_path):
    done = mpitrain("report", tmp_path)
    assert done.code == 2
    assert done.err == f"mpitrain: error: report: {tmp_path}: holds no run; name the directory with its job.toml\n"


def test_help_names_every_command():
    done = mpitrain("--help")
    assert done.code == 0
    for name in ("doctor", "init", "predict", "report", "run"):
        assert f"  {name} " in done.out


def test_a_resumed_run_says_from_where_it_goes_on(tmp_path):
    def told(steps, **where):
        text = StringIO()
        job = Job.load(write_job(tmp_path), [f"train.steps={steps}"])
        train_job(job, alone(), report=False, observer=Lines(Console(file=text, width=200)), **where)
        return text.getvalue().splitlines()

    run = tmp_path / "run"
    assert told(12, run_dir=run)[2].startswith("step 4/12")
    title, _, goes_on, first, *_ = told(24, resume=run)
    assert "24 steps on 1 rank" in title
    assert goes_on == "goes on   from step 12 of 24 (checkpoints/step-00000012)"
    assert first.startswith("step 16/24")
    shutil.rmtree(run / "checkpoints")  # as if it had been killed before the first one
    assert told(24, resume=run)[0] == "the run has no checkpoint yet, and begins anew"
