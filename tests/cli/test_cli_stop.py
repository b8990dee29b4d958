"""Signals and terminals: Ctrl-C and what launchers send end a run with a checkpoint, from which it goes on exactly."""

import json
import shlex
import signal
import sys
import time

import pytest
from click.testing import CliRunner
from commands import JOB, metrics, mpitrain, started, write_job

from mpitrain.cli import cli
from mpitrain.cli.run import _print_result

MODEL = """
import time
from mpitrain import nn


class Slow(nn.Network):
    def loss_and_gradients(self, *arguments):
        time.sleep(self.seconds if self.begun else 0)
        self.begun = True
        return super().loss_and_gradients(*arguments)


def build(seconds=0.03, hold=0.0):
    time.sleep(hold)
    layers = nn.Linear(5, 12), nn.BatchNorm(12), nn.Dropout(0.2), nn.Linear(12, 3)
    model = Slow(nn.Sequential(*layers), nn.CrossEntropy())
    model.seconds, model.begun = seconds, False
    return model
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A slow job of 40 steps, and in ``whole`` its uninterrupted run."""
    folder = tmp_path_factory.mktemp("stop")
    (folder / "model.py").write_text(MODEL)
    head, _, tail = JOB.partition('kind = "mlp"')
    text = head + 'build = "model.py:build"\n' + tail.partition("dropout = 0.2\n")[2]
    write_job(folder, text.replace("log_every_steps = 4", "log_every_steps = 1").replace("steps = 24", "steps = 40"))
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """The result of the uninterrupted run on two ranks."""
    done = mpitrain("run", "-n", "2", "job.toml", "--json", "--quiet", "--run-dir", "whole", cwd=folder)
    assert done.code == 0, done.err
    return done.result


def interrupt(folder, name, number, *arguments, under=0):
    """Start the job, send a signal at step 4, and return how it ended."""
    run = folder / name
    options = ("--json", "--progress=lines", "--run-dir", run)
    with started("run", *arguments, "job.toml", *options, under=under, cwd=folder) as running:
        running.wait_for(lambda: any(record["step"] >= 4 for record in metrics(run)))
        running.process.send_signal(number)
        return running.end()


@pytest.mark.parametrize(
    ("name", "number", "arguments", "under"),
    [
        ("ctrl-c", signal.SIGINT, ("-n", "2"), 0),
        pytest.param("usr1", signal.SIGUSR1, (), 2, marks=pytest.mark.slow),
        pytest.param("usr1-n", signal.SIGUSR1, ("-n", "2"), 0, marks=pytest.mark.slow),
    ],
)
def test_stops_with_a_checkpoint_and_goes_on_exactly(folder, whole, name, number, arguments, under):
    done = interrupt(folder, name, number, *arguments, under=under)
    assert done.code == (130 if number == signal.SIGINT else 0), done.err
    stopped = done.result
    assert stopped["stopped"] == f"stopped by {number.name}"
    assert not stopped["completed"]
    assert 4 <= stopped["steps"] < 40
    told = "stopping at the next step; Ctrl-C again to end at once"
    assert (told in done.err) == (number == signal.SIGINT)
    started = json.loads((folder / name / "environment.json").read_text())
    again = mpitrain("run", "-n", "2", "job.toml", "--json", "--quiet", "--resume", name, cwd=folder)
    assert again.code == 0, again.err
    environment = json.loads((folder / name / "environment.json").read_text())
    assert environment["command"] == shlex.split(f"mpitrain run -n 2 job.toml --json --quiet --resume {name}")
    assert (environment["from_step"], environment["earlier_starts"]) == (stopped["steps"], [started])
    assert again.result["weights_sha256"] == whole["weights_sha256"]
    records = [(record["kind"], record["step"]) for record in metrics(folder / name)]
    assert len(set(records)) == len(records)
    assert {step for kind, step in records if kind == "train"} == set(range(1, 41))


def test_ctrl_c_on_one_rank(folder):
    done = interrupt(folder, "one", signal.SIGINT)
    assert done.code == 130, done.err
    assert done.result["stopped"] == "stopped by SIGINT"
    assert (folder / "one" / "checkpoints" / f"step-{done.result['steps']:08d}").is_dir()


def test_what_mpirun_sends_at_ctrl_c_still_saves(folder):
    """It ends its ranks with SIGTERM, and soon after with SIGKILL: the checkpoint is all there is time for."""
    rare = "--set=train.checkpoint.every_steps=1000"
    done = interrupt(folder, "mpirun", signal.SIGINT, rare, under=2)
    assert done.code != 0  # as mpirun says
    assert "Traceback" not in done.err
    assert list((folder / "mpirun" / "checkpoints").glob("step-*"))


def test_a_second_ctrl_c_does_not_wait_for_the_step(folder):
    run = folder / "twice"
    slow = "--set=model.options.seconds=40"
    with started("run", "-n", "2", "job.toml", slow, "--quiet", "--run-dir", run, cwd=folder) as running:
        running.wait_for(lambda: bool(metrics(run)))
        began = time.monotonic()
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        running.process.send_signal(signal.SIGINT)
        done = running.end()
    assert time.monotonic() - began < 20
    assert done.code == 130
    assert "stopping at the next step" in done.err
    assert [record["step"] for record in metrics(run)] == [1]


def test_a_signal_is_not_lost_on_a_stopped_process(folder):
    """The kernel then gives it to any thread, and Python acts on it in the main one, which waits for the child."""
    run = folder / "frozen"
    with started("run", "-n", "2", "job.toml", "--json", "--quiet", "--run-dir", run, cwd=folder) as running:
        running.wait_for(lambda: bool(metrics(run)))
        for number in (signal.SIGSTOP, signal.SIGUSR1, signal.SIGCONT):
            running.process.send_signal(number)
        assert running.end().result["steps"] < 40


def test_a_stopped_run_says_how_to_go_on(folder):
    run = folder / "says"
    short = "--set=train.stop.wall_time_s=0.2"
    done = mpitrain("run", "-n", "2", "job.toml", "--quiet", short, "--run-dir", run, cwd=folder)
    assert done.code == 0
    assert "(wall time of 0.2 s is over)" in done.out
    assert done.out.splitlines()[-1] == f"go on     mpitrain run -n 2 {run}/job.toml --resume {run}"


def test_ctrl_c_while_the_ranks_start(folder):
    held = "--set=model.options.hold=3.0"  # on a busy machine the signal may come after a second or two
    with started("run", "-n", "2", "job.toml", held, "--quiet", "--run-dir", "early", cwd=folder) as running:
        running.wait_for(running.has_ranks)
        running.process.send_signal(signal.SIGINT)
        done = running.end()
    assert (done.code, done.out) == (130, "")
    assert done.err.splitlines()[-1] == "interrupted before the first step; nothing was written"
    assert not (folder / "early").exists()


EARLY = """
import os, signal, subprocess, sys
from mpitrain.cli import main


class Popen(subprocess.Popen):
    def __init__(self, argv, **options):
        super().__init__(argv, **options)
        if "start_new_session" in options:
            os.kill(os.getpid(), signal.{})


subprocess.Popen = Popen
sys.argv[0] = "mpitrain"
main()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 1)])
def test_a_signal_while_the_launcher_starts_leaves_no_ranks_to_themselves(folder, name, code):
    program = (sys.executable, "-c", EARLY.format(name))
    arguments = "run", "-n", "2", "job.toml", "--quiet", "--run-dir", "left"
    with started(*arguments, program=program, cwd=folder) as running:
        done = running.end()
    assert (done.code, done.out) == (code, "")
    assert (done.err.splitlines()[-1:] == ["interrupted before the first step; nothing was written"]) == (code == 130)
    assert not (folder / "left").exists()


def test_ctrl_c_before_there_are_ranks(folder, monkeypatch):
    def launch(ranks, arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("mpitrain.cli.run.launch", launch)
    done = CliRunner().invoke(cli, ["run", "-n", "2", str(folder / "job.toml")])
    assert (done.exit_code, done.output) == (130, "interrupted before the first step; nothing was written\n")


ENDS = """
import os
import signal
from mpitrain import nn


class Ends(nn.Network):
    steps = 0

    def loss_and_gradients(self, *arguments):
        self.steps += 1
        loss, *others = super().loss_and_gradients(*arguments)
        if self.steps == 8 and self.by == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return (loss + float("nan") if self.steps == 8 else loss, *others)


def build(by):
    model = Ends(nn.Sequential(nn.Linear(5, 3)), nn.CrossEntropy())
    model.by = by
    return model
"""


@pytest.mark.parametrize(("by", "goes_on"), [("kill", True), pytest.param("nan", False, marks=pytest.mark.slow)])
def test_a_run_that_a_killed_rank_ends_says_how_to_go_on(folder, by, goes_on):
    """But not one that would meet the same numbers again."""
    (folder / "ends.py").write_text(ENDS)
    settings = 'model.build="ends.py:build"', f'model.options.by="{by}"'
    run = folder / f"ends-{by}"
    done = mpitrain(
        "run", "-n", "2", "job.toml", "--quiet", *(f"--set={each}" for each in settings), "--run-dir", run, cwd=folder
    )
    assert done.code == 1
    assert (run / "checkpoints" / "step-00000006").is_dir()
    assert (f"go on     mpitrain run -n 2 {run}/job.toml --resume {run}" in done.err.splitlines()) == goes_on
    assert ("is not finite" in done.err) != goes_on


def test_what_to_type_next_can_be_typed_for_a_path_with_spaces(capsys):
    result = {
        "job": "job", "ranks": 2, "steps": 3, "seconds": 1.0, "stopped": "stopped by SIGUSR1", "completed": False,
        "metrics": {}, "weights_sha256": "0", "report": None, "run_dir": "/runs/my job",
    }  # fmt: skip
    _print_result(result, as_json=False, traced=False)
    *_, report, go_on = map(shlex.split, capsys.readouterr().out.splitlines())
    assert report[-3:] == ["mpitrain", "report", "/runs/my job"]
    assert go_on[-3:] == ["/runs/my job/job.toml", "--resume", "/runs/my job"]
