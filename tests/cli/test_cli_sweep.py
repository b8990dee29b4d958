"""``mpitrain sweep``: a grid of serial runs on several ranks, failures, and a second start."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from commands import JOB, mpitrain, started, write_job
from threadpoolctl import threadpool_limits

from mpitrain._errors import InputError, JobError
from mpitrain.comm.local import alone
from mpitrain.train import Job, sweep_job
from mpitrain.train.grid import parse_grid, plan

SMALL = JOB.replace("hidden = [12]", "hidden = [6]").replace("steps = 24", "steps = 12")
GRID_TEXTS = ("optimizer.lr=0.05,0.001,1e30", "model.hidden=[5],[4, 3]")
GRID = tuple(f"--grid={text}" for text in GRID_TEXTS)


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """A sweep of four points that run and two that fail, in ``sweeps/job``, and what its first start ended with."""
    folder = tmp_path_factory.mktemp("sweep")
    write_job(folder, SMALL)
    return folder, mpitrain("sweep", "job.toml", "-n", "3", *GRID, "--json", cwd=folder)


def by_settings(summary):
    return {(p["settings"]["optimizer.lr"], *p["settings"]["model.hidden"]): p for p in summary["points"]}


def test_all_points_are_kept_and_failed_ones_told(sweeps):
    folder, done = sweeps
    assert done.code == 1
    assert "Traceback" not in done.err
    summary = done.result
    assert summary == json.loads((folder / "sweeps" / "job" / "sweep.json").read_text())
    assert (summary["job"], summary["ranks"], summary["metric"]) == ("job", 3, "test_loss")
    points = by_settings(summary)
    assert points.keys() == {(lr, *hidden) for lr in (0.05, 0.001, 1e30) for hidden in ([5], [4, 3])}
    for (lr, *_), point in points.items():
        assert point["status"] == ("failed" if lr == 1e30 else "done")
        assert point["rank"] in range(3)
        assert (point["error"] is None) == (lr != 1e30)
    assert "is not finite" in points[1e30, 5]["error"]
    told = [line for line in done.err.splitlines() if " on rank " in line]
    assert len(told) == 6


def test_points_are_sorted_by_the_metric_of_the_job(sweeps):
    values = [point["value"] for point in sweeps[1].result["points"]]
    assert values[:4] == sorted(values[:4])
    assert values[4:] == [None, None]


def test_a_point_is_the_serial_run_with_its_settings(sweeps):
    folder, done = sweeps
    point = by_settings(done.result)[0.05, 4, 3]
    alone = mpitrain("run", "job.toml", "--set=optimizer.lr=0.05", "--set=model.hidden=[4,3]", "--json", "--quiet",
                     cwd=folder)  # fmt: skip
    kept = json.loads((Path(point["run_dir"]) / "result.json").read_text())
    assert kept["weights_sha256"] == alone.result["weights_sha256"]
    assert point["metrics"] == alone.result["metrics"]
    assert point["value"] == alone.result["metrics"]["test_loss"]
    assert kept["ranks"] == 1
    assert kept["report"] is None


def test_a_second_start_skips_what_is_done(sweeps):
    folder, first = sweeps
    before = {point["run_dir"]: (Path(point["run_dir"]) / "COMPLETED").stat().st_mtime_ns
              for point in first.result["points"] if point["status"] == "done"}  # fmt: skip
    wider = mpitrain("sweep", "job.toml", *GRID[1:], "--grid=optimizer.lr=0.02,0.05,0.001", cwd=folder)
    assert wider.code == 0, wider.err
    assert [line.partition("  ")[0] for line in wider.err.splitlines()] == [
        "model.hidden=[5] optimizer.lr=0.02",
        "model.hidden=[4, 3] optimizer.lr=0.02",
    ]
    assert {run: (Path(run) / "COMPLETED").stat().st_mtime_ns for run in before} == before
    title, *rows = wider.out.splitlines()
    assert title.startswith("job: 6 points, by test_loss")
    assert sum("done" in row for row in rows) == 6
    assert "\x1b" not in wider.out


def test_points_have_the_threads_of_their_rank(tmp_path, monkeypatch):
    for name in ("OMP", "OPENBLAS", "MKL", "BLIS"):
        monkeypatch.delenv(f"{name}_NUM_THREADS", raising=False)
    crashed = tmp_path / "sweep" / "seed=3"
    crashed.mkdir(parents=True)
    (crashed / "environment.json").write_text("{")  # before there is a job.toml, there is no run
    with threadpool_limits(1):  # as on a rank that shares its CPUs with others, which a serial run knows nothing of
        sweep_job(write_job(tmp_path, SMALL), [], {"seed": [3]}, alone(), tmp_path / "sweep")
    environment = json.loads((crashed / "environment.json").read_text())
    assert {library["threads"] for node in environment["nodes"] for library in node["blas"]} == {1}


@pytest.mark.parametrize("text", ["{", "[]", '{"metrics": 3}'])
def test_the_damaged_result_of_a_point_is_said_before_others_run(tmp_path, text):
    path, into = write_job(tmp_path, SMALL), tmp_path / "sweep"
    sweep_job(path, [], {"seed": [0]}, alone(), into)
    (into / "seed=0" / "result.json").write_text(text)
    with pytest.raises(
        InputError, match=r"^sweep: .*seed=0/result.json: damaged; remove .*seed=0, and the same command"
    ):
        sweep_job(path, [], {"seed": [1, 0]}, alone(), into)
    assert not (into / "seed=1").exists()


def test_another_job_is_refused_in_the_same_directory(sweeps):
    folder, _ = sweeps
    what = "another job was run here; got seed = 1, the run has 0; choose another directory with --sweep-dir"
    with pytest.raises(JobError, match=what):
        sweep_job(folder / "job.toml", ["seed=1"], parse_grid(GRID_TEXTS), alone(), str(folder / "sweeps" / "job"))


def test_a_cosine_over_another_length_is_another_job(tmp_path):
    path, grid, into = write_job(tmp_path, SMALL), {"seed": [0]}, tmp_path / "sweep"
    cosine = 'optimizer.schedule.kind="cosine"'
    assert sweep_job(path, [cosine], grid, alone(), into)["points"][0]["status"] == "done"
    with pytest.raises(JobError, match=r"got train\.steps = 14, the run has 12, which its cosine schedule runs over"):
        sweep_job(path, [cosine, "train.steps=14"], grid, alone(), into)


def test_ctrl_c_ends_the_points_under_way_and_the_next_start_goes_on(tmp_path):
    endless = SMALL.replace("steps = 12", "steps = 1000000").replace("every_steps = 6", "every_steps = 1000000")
    write_job(tmp_path, endless)
    arguments = ("sweep", "job.toml", "-n", "2", "--grid=seed=0,1,2", "--json")
    runs = tmp_path / "sweeps" / "job"
    with started(*arguments, cwd=tmp_path) as running:
        running.wait_for(lambda: len(list(runs.glob("*/metrics.jsonl"))) == 2)
        running.process.send_signal(signal.SIGINT)
        done = running.end()
    assert (done.code, done.result["stopped"]) == (130, "SIGINT"), done.err
    points = done.result["points"]
    assert [point["status"] for point in points] == ["stopped"] * 3
    steps = {point["settings"]["seed"]: point["steps"] for point in points}
    assert [seed for seed, reached in steps.items() if reached is None] == [2]
    assert not (runs / "seed=2").exists()
    last = max(reached for reached in steps.values() if reached)
    again = mpitrain(*arguments[:2], *arguments[4:], f"--set=train.steps={last}", cwd=tmp_path)
    assert again.code == 0, again.err
    assert {(point["status"], point["steps"]) for point in again.result["points"]} == {("done", last)}


@pytest.mark.parametrize(
    ("grids", "expected"),
    [
        (["optimizer.lr=0.1,1e-2"], {"optimizer.lr": [0.1, 0.01]}),
        (["model.hidden=[64],[128, 64]"], {"model.hidden": [[64], [128, 64]]}),
        (["optimizer.kind=adam,sgd"], {"optimizer.kind": ["adam", "sgd"]}),
        (["a.b='x,y',\"z\"", "c=true, 3"], {"a.b": ["x,y", "z"], "c": [True, 3]}),
    ],
)
def test_values_of_a_grid_are_those_of_toml(grids, expected):
    assert parse_grid(grids) == expected


def test_tables_and_any_text_are_values_of_a_grid(tmp_path):
    """Tables in tables, and characters that JSON escapes in two pieces."""
    tables = ["{kind='int8'}", "{kind='topk', ratio=0.5}"]
    grid = parse_grid([f"method={{codec={tables[0]}}},{{codec={tables[1]}}}", "data.path=a.npz,𝄞.npz"])
    jobs = [point.job for point in plan(write_job(tmp_path), [], grid, tmp_path / "sweep")]
    expected = [Job.load(tmp_path / "job.toml", [f"method.codec={each}"]) for each in tables]
    assert [job.method.codec for job in jobs[::2]] == [job.method.codec for job in expected]
    assert [Path(job.data.path).name for job in jobs] == ["a.npz", "𝄞.npz"] * 2


@pytest.mark.parametrize("grids", [["optimizer.lr"], ["a="], ["=1,2"], ["a=1,,2"], ["a=1,1"], ["a=1", "a=2"], ["a=x,"]])
def test_a_grid_that_cannot_be_understood_is_refused(grids):
    with pytest.raises(JobError, match=r"--grid .*: cannot be understood; expected KEY=VALUE,VALUE"):
        parse_grid(grids)


@pytest.mark.parametrize(
    ("key", "values", "line"),
    [
        ("optimizer.lrr", [0.1], '--grid: optimizer.lrr: unknown key with kind = "adam"; .*did you mean "lr"'),
        ("optimizer.lr", [0.1, -1], "--grid: optimizer.lr: is too small; got -1"),
        ("seed.x", [1], '--grid seed.x=1: "seed" is not a table'),
        ("train.batch_size", [4], "--set: seed: is too small; got -1"),
    ],
)
def test_what_is_wrong_with_a_point_names_the_grid(tmp_path, key, values, line):
    job = write_job(tmp_path, JOB.replace("[data]", "seed = 1\n[data]", 1))
    overrides = ["seed=-1"] if "--set" in line else []
    with pytest.raises(JobError, match=f"^{line}"):
        sweep_job(job, overrides, {key: values}, alone(), tmp_path / "sweep")


@pytest.mark.parametrize(
    ("grid", "got"),
    [
        ({"data.valid": [0.0, 0.1]}, "test_loss, valid_loss"),
        ({"train.checkpoint.best": ["loss", "accuracy"]}, "test_accuracy, test_loss"),
    ],
)
def test_points_that_go_by_different_metrics_are_refused(tmp_path, grid, got):
    with pytest.raises(JobError, match=f"^sweep: its points go by different metrics, .*; got {got}; give all points"):
        sweep_job(write_job(tmp_path), [], grid, alone(), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_mistake_in_any_point_ends_the_sweep_before_it_begins(tmp_path):
    with pytest.raises(JobError, match=r"--grid: optimizer\.lr"):
        sweep_job(write_job(tmp_path), [], {"optimizer.lr": [0.1, -1]}, alone(), tmp_path / "sweep")
    for grid in ({}, {"seed": []}):
        with pytest.raises(JobError, match="sweep: has no points"):
            sweep_job(tmp_path / "job.toml", [], grid, alone(), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
