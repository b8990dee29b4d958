"""The loop around any method: advance, log, evaluate, save, stop.

It decides *when*; the method decides how gradients become parameters, and the run directory how things are kept.
Whatever steers the loop is the same on all ranks: it comes from the job, or out of a collective.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from math import isfinite, prod
from pathlib import Path
from typing import Any

from mpitrain.comm import Communicator
from mpitrain.comm.guard import agree
from mpitrain.method import Progress, State
from mpitrain.train import checkpoint
from mpitrain.train.assembly import Assembly, single_numbers
from mpitrain.train.checkpoint import Checkpoint, OnPhase, Score
from mpitrain.train.job import Job
from mpitrain.train.job.train import lower_is_better
from mpitrain.train.observer import Observer
from mpitrain.train.rundir import RunDirectory
from mpitrain.train.signals import NameSignal, own_name


@dataclass
class Standing:
    """What the loop itself must remember over a resumption; part of each checkpoint."""

    seconds: float = 0.0  # trained so far, over all resumptions
    loss: float | None = None  # of the newest training record
    watched: dict[str, float] | None = None  # newest evaluation of the set that steers the run
    metric: str | None = None  # that `patience` watches; None before an evaluation, and in older checkpoints
    best: float | None = None  # of this metric; larger is better
    stale: int = 0  # evaluations since the best one


class Trainer:
    """Trains one job on the ranks of a communicator.  All calls are collective.

    Parameters
    ----------
    job : Job
        What to run.
    comm : Communicator
        On which ranks.
    assembly : Assembly
        The job's parts, set up.
    run_dir : RunDirectory
        Where the run is kept.
    observer : Observer
        Told what happens; the ranks' own.
    on_phase : callable, optional
        Told each phase of writing a checkpoint; for tests that crash there.
    name_signal : callable
        Names what asks for a stop.
    """

    def __init__(
        self,
        job: Job,
        comm: Communicator,
        assembly: Assembly,
        run_dir: RunDirectory,
        observer: Observer | None = None,
        on_phase: OnPhase | None = None,
        name_signal: NameSignal = own_name,
    ) -> None:
        self.job, self.comm, self.parts, self.run_dir = job, comm, assembly, run_dir
        self.observer = observer or Observer()
        self.method = assembly.method
        self.standing = Standing()
        self._goes_on_from: Path | None = None
        self._last: dict[str, dict[str, Any]] = {}  # newest metrics by kind
        self._on_phase, self._name_signal = on_phase, name_signal
        self._asked: str | None = None  # why this rank was asked to stop
        self._start_clock()

    def restore(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint of this or another number of ranks."""
        self.method.load(saved.scalars["method"], saved.read)
        self._goes_on_from = saved.path
        self.standing = Standing(**saved.scalars["standing"])
        if self.standing.metric not in (None, self.job.train.stop.metric):
            self.standing.best, self.standing.stale = None, 0  # of a metric that nothing watches any more
        self._start_clock()

    def run(self) -> str:
        """Train to the end, or until something stops it; save; return why it stopped."""
        self._start_clock()
        self.observer.on_start(self.parts.title, self.parts.steps, self.method.step)
        self.observer.on_kept(self.run_dir.path)
        if self._goes_on_from is not None:
            self.observer.on_resumed(self._goes_on_from)
        try:
            with self._stop_after_wall_time():
                return self._loop()
        finally:
            self.observer.on_end()

    def _start_clock(self) -> None:
        """Count on from the seconds that were trained before."""
        self._began = time.monotonic() - self.standing.seconds

    @property
    def completed(self) -> bool:
        """Whether nothing is left to do: a run that a signal or the wall time ended may go on."""
        return self.method.step >= self.parts.steps or self._verdict() is not None

    def _loop(self) -> str:
        cadence = self.parts.cadence
        reason = self._verdict()  # a run that was killed after its last checkpoint has nothing left to do
        while reason is None and self.method.step < self.parts.steps:
            before, began = self.method.step, time.monotonic()
            progress = self.method.advance(self.parts.feed, cadence.next_event(before))
            self._log(progress, time.monotonic() - began)
            if cadence.crossed("evaluate", before, progress.step):
                self._judge(self.evaluate(self.parts.watched))
                reason = self._verdict()
            if progress.stop_requested and reason is None and progress.step < self.parts.steps:
                reason = self._agreed_reason()
            if reason or cadence.crossed("checkpoint", before, progress.step):
                with self.comm.phase("checkpoint"):
                    self._save(self._score())
        return reason or f"all {self.parts.steps} steps done"

    def _log(self, progress: Progress, seconds: float) -> None:
        rate = progress.samples / max(seconds, 1e-9)
        self.standing.loss = progress.loss if isfinite(progress.loss) else None
        numbers = {"loss": progress.loss, "lr": progress.lr, "samples_per_s": rate}
        facts = self.parts.samples.facts
        if facts.task == "sequence":
            numbers["tokens_per_s"] = rate * prod(facts.sample_shape)
        if progress.loss_scale is not None:
            numbers |= {"loss_scale": progress.loss_scale, "skipped_steps": progress.skipped}
        self._record("train", numbers)

    def final(self, kind: str) -> dict[str, Any]:
        """Return the metrics of a held-out set as things stand, from the last evaluation if nothing moved since."""
        newest = self._last.get(kind)
        return newest if newest and newest["step"] == self.method.step else self.evaluate(kind)

    def evaluate(self, kind: str) -> dict[str, Any]:
        """Evaluate on a held-out set, ``"valid"`` or ``"test"``, and record it."""
        with self.comm.phase(f"evaluate {kind}"):
            metrics = self.method.evaluate(self.parts.held_out[kind]())
        self._last[kind] = {**metrics, "step": self.method.step}
        self._record(kind, metrics)
        return metrics

    def _record(self, kind: str, metrics: dict[str, Any]) -> None:
        step = self.method.step
        self.standing.seconds = time.monotonic() - self._began
        epoch, seconds = round(step / self.parts.steps_per_epoch, 4), round(self.standing.seconds, 3)
        record = {"kind": kind, "step": step, "epoch": epoch, "seconds": seconds, **single_numbers(metrics)}
        with self.comm.phase("log"), agree(self.comm):  # the disk may be full, which rank 0 alone finds out
            if self.comm.rank == 0 and self._recorded.get(kind) != step:
                self.run_dir.append_metrics(record)
                self._recorded[kind] = step
        self.observer.on_metrics(record)

    @cached_property
    def _recorded(self) -> dict[str, int]:
        """Newest step in the metrics file by kind; for rank 0, within `agree`."""
        return {record["kind"]: record["step"] for record in self.run_dir.read_metrics()}

    def _judge(self, metrics: dict[str, Any]) -> None:
        """Take an evaluation into account."""
        stop, standing = self.job.train.stop, self.standing
        standing.metric = stop.metric
        standing.watched = {name: value for name, value in single_numbers(metrics).items() if isfinite(value)}
        value = standing.watched.get(stop.metric)
        if value is None:  # not finite, or not there, where nothing asks for it
            standing.stale += 1
            return
        value = -value if stop.minimise else value
        if standing.best is None or value > standing.best + stop.min_delta:
            standing.best, standing.stale = value, 0
        else:
            standing.stale += 1

    def _verdict(self) -> str | None:
        """Tell why to stop, going by the evaluations so far: the target is reached, or nothing improves any more."""
        stop, standing = self.job.train.stop, self.standing
        target = stop.target
        if target is not None and target.metric in (standing.watched or {}) and target.reached(standing.watched or {}):
            return f"{target.metric} reached its target"
        if stop.patience is not None and standing.stale >= stop.patience:
            return f"{stop.metric} has not improved in {stop.patience} evaluations"
        return None

    def _agreed_reason(self) -> str:
        reasons = self.comm.allgather_object(self._asked)
        return next((reason for reason in reasons if reason), "asked to stop")

    def _score(self) -> Score | None:
        """Return how good the model is, if it was evaluated at this step."""
        metric = self.job.train.checkpoint.best
        newest = self._last.get(self.parts.watched)
        if newest is None or newest["step"] != self.method.step:
            return None
        return Score(metric, float(newest[metric]), not lower_is_better(metric))

    def _save(self, score: Score | None) -> None:
        self.standing.seconds = time.monotonic() - self._began
        state = self.method.state()
        scalars = {"method": state.scalars, "standing": asdict(self.standing)}
        checkpoint.save(
            self.run_dir.checkpoints,
            self.method.step,
            State(state.pieces, scalars),
            self.comm,
            self.parts.model.layout,
            score=score,
            keep=self.job.train.checkpoint.keep,
            on_phase=self._on_phase,
        )

    def ask_to_stop(self, reason: str) -> None:
        """Ask all ranks to save and stop at the next commit point; local, and safe in a signal handler."""
        self._asked = reason
        self.method.request_stop()

    def stop_by_signal(self, number: signal.Signals) -> None:
        """Ask for a stop in the name of a signal that arrived, e.g. by `stop_on_signals`."""
        self.ask_to_stop(f"stopped by {self._name_signal(number)}")

    @contextmanager
    def _stop_after_wall_time(self) -> Iterator[None]:
        limit = self.job.train.stop.wall_time_s
        if limit is None or self.comm.rank != 0:
            yield
            return
        timer = threading.Timer(limit, self.ask_to_stop, [f"wall time of {limit:g} s is over"])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
