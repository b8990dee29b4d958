"""Early stops: a target, patience, wall time and signals."""

import json
import signal
import time
from dataclasses import asdict

import pytest
from commands import metrics
from trainer_cases import train

from mpitrain.comm.local import alone as alone_comm
from mpitrain.train import Observer, checkpoint, train_job

pytestmark = pytest.mark.usefixtures("no_pictures")


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
