"""The whole job is killed, at any step and in every phase of a checkpoint, and goes on as if nothing had been."""

import random
import sys

import pytest
from commands import JOB, metrics, mpitrain, started, write_job

MODEL = """
import time
from mpitrain import nn


class Slow(nn.Network):
    def loss_and_gradients(self, *arguments):
        time.sleep(0.02)
        return super().loss_and_gradients(*arguments)


def build():
    layers = nn.Linear(5, 12), nn.BatchNorm(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3)
    return Slow(nn.Sequential(*layers), nn.CrossEntropy())
"""

HALTING = """
import sys, time
from pathlib import Path
from mpitrain.comm import world
from mpitrain.train import Job, train_job

run, phase, occurrence = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
told = []

def on_phase(found):
    told.append(found)
    if told.count(phase) == occurrence:
        Path(f"{run}.reached").touch()
        time.sleep(60)

train_job(Job.load("job.toml"), world(), run_dir=run, on_phase=on_phase)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A slow job of 24 steps, and in ``whole`` its uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("kill")
    (folder / "model.py").write_text(MODEL)
    head, _, tail = JOB.partition('kind = "mlp"')
    text = head + 'build = "model.py:build"\n' + tail.partition("dropout = 0.2\n")[2]
    write_job(folder, text.replace("log_every_steps = 4", "log_every_steps = 1") + "keep = 1\n")
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """The result of the uninterrupted run."""
    done = run_two(folder, "--run-dir", "whole")
    assert done.code == 0, done.err
    return done.result


def run_two(folder, *arguments):
    return mpitrain("run", "job.toml", "--json", "--quiet", *arguments, under=2, cwd=folder)


def kill_at(folder, run, step, *arguments):
    """Start the job and kill all of it once ``step`` is in the metrics."""
    with started("run", "job.toml", "--quiet", *arguments, under=2, cwd=folder) as running:
        running.wait_for(lambda: any(record["step"] >= step for record in metrics(run)))
        assert running.process.poll() is None, "it ended before it was killed"
        running.kill()


def check_resumed(folder, run, whole, done):
    assert done.code == 0, done.err
    assert done.result["weights_sha256"] == whole["weights_sha256"]
    assert done.result["metrics"] == whole["metrics"]
    kinds = [(record["kind"], record["step"]) for record in metrics(folder / run)]
    assert kinds == [(record["kind"], record["step"]) for record in metrics(folder / "whole")]
    assert not [path for path in (folder / run).rglob(".*") if path.suffix != ".toml"]


@pytest.mark.slow
def test_killed_twice(folder, whole):
    """Before the first checkpoint, and then between two."""
    run = folder / "twice"
    kill_at(folder, run, 3, "--run-dir", run)
    kill_at(folder, run, 15, "--resume", run)
    check_resumed(folder, "twice", whole, run_two(folder, "--resume", run))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_a_random_step(folder, whole, seed):
    run = folder / f"random-{seed}"
    kill_at(folder, run, random.Random(seed).randint(1, 23), "--run-dir", run)
    check_resumed(folder, run.name, whole, run_two(folder, "--resume", run))


PHASES = {"created": 2, "piece": 30, "data": 2, "manifest": 2, "renamed": 2, "recorded": 2, "discarded": 1, "pruned": 2}
"""At which time that a phase comes the job is killed: in the second checkpoint, or in the first that one is removed."""


@pytest.mark.parametrize(
    ("phase", "occurrence"),
    [pytest.param(*item, marks=[pytest.mark.slow] * (item[0] != "manifest")) for item in PHASES.items()],
)
def test_killed_inside_a_checkpoint(folder, whole, phase, occurrence):
    run, reached = folder / phase, folder / f"{phase}.reached"
    program = (sys.executable, "-c", HALTING)
    with started(run, phase, str(occurrence), under=2, cwd=folder, program=program) as running:
        running.wait_for(reached.exists)
        assert running.process.poll() is None, "it ended before it was killed"
        running.kill()
    assert (run / "checkpoints" / "step-00000006").exists() or phase in ("discarded", "pruned", "recorded", "renamed")
    check_resumed(folder, run.name, whole, run_two(folder, "--resume", run))
