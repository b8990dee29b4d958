"""The loop around any method: advance, log, evaluate, save, stop.

It decides *when*; the method decides how gradients become parameters, and the run directory how things are kept.
Whatever steers the loop is the same on all ranks: it comes from the job, or out of a collective.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from mpitrain.comm import Communicator
from mpitrain.method import Progress, State
from mpitrain.train import checkpoint
from mpitrain.train.assembly import Assembly
from mpitrain.train.checkpoint import Checkpoint, OnPhase, Score
from mpitrain.train.job import Job
from mpitrain.train.job_train import lower_is_better
from mpitrain.train.observer import Observer
from mpitrain.train.rundir import RunDirectory

STOP_SIGNALS = (signal.SIGINT, signal.SIGUSR1)


@dataclass
class Standing:
    """What the loop itself must remember over a resumption; part of each checkpoint."""

    seconds: float = 0.0  # trained so far, over all resumptions
    best: float | None = None  # of the metric that `patience` watches; larger is better
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
    """

    def __init__(
        self,
        job: Job,
        comm: Communicator,
        assembly: Assembly,
        run_dir: RunDirectory,
        observer: Observer | None = None,
        on_phase: OnPhase | None = None,
    ) -> None:
        self.job, self.comm, self.parts, self.run_dir = job, comm, assembly, run_dir
        self.observer = observer or Observer()
        self.method = assembly.method
        self.standing = Standing()
        self.last: dict[str, dict[str, Any]] = {}  # newest metrics by kind
        self._on_phase = on_phase
        self._asked: str | None = None  # why this rank was asked to stop
        self._saved_at = -1

    def restore(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint of this or another number of ranks."""
        self.method.load(saved.scalars["method"], saved.read)
        self.standing = Standing(**saved.scalars["standing"])
        self._saved_at = self.method.step

    def run(self) -> str:
        """Train to the end, or until something stops it; save; return why it stopped."""
        self._began = time.monotonic() - self.standing.seconds
        self.observer.on_start(self.parts.title, self.parts.steps, self.method.step)
        try:
            with self._stop_on_signals(), self._stop_after_wall_time():
                reason = self._loop()
        finally:
            self.observer.on_end()
        if self._saved_at != self.method.step:
            self._save(None)
        return reason

    def _loop(self) -> str:
        cadence = self.parts.cadence
        reason = None
        while reason is None and self.method.step < self.parts.steps:
            before, began = self.method.step, time.monotonic()
            progress = self.method.advance(self.parts.feed, cadence.next_event(before))
            self._log(progress, time.monotonic() - began)
            if cadence.crossed("evaluate", before, progress.step):
                reason = self._judge(self.evaluate(self.parts.watched))
            if progress.stop_requested:
                reason = self._agreed_reason()
            if reason or cadence.crossed("checkpoint", before, progress.step):
                self._save(self._score())
        return reason or f"all {self.parts.steps} steps done"

    def _log(self, progress: Progress, seconds: float) -> None:
        rate = progress.samples / max(seconds, 1e-9)
        self._record("train", {"loss": progress.loss, "lr": progress.lr, "samples_per_s": rate})

    def final(self, kind: str) -> dict[str, Any]:
        """Return the metrics of a held-out set as things stand, from the last evaluation if nothing moved since."""
        newest = self.last.get(kind)
        return newest if newest and newest["step"] == self.method.step else self.evaluate(kind)

    def evaluate(self, kind: str) -> dict[str, Any]:
        """Evaluate on a held-out set, ``"valid"`` or ``"test"``, and record it."""
        metrics = self.method.evaluate(self.parts.held_out[kind]())
        self._record(kind, metrics)
        return metrics

    def _record(self, kind: str, metrics: dict[str, Any]) -> None:
        step = self.method.step
        self.standing.seconds = time.monotonic() - self._began
        epoch, seconds = round(step / self.parts.steps_per_epoch, 4), round(self.standing.seconds, 3)
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        record = {"kind": kind, "step": step, "epoch": epoch, "seconds": seconds, **numbers}
        self.last[kind] = {**metrics, "step": step}
        if self.comm.rank == 0:
            self.run_dir.append_metrics(record)
        self.observer.on_metrics(record)

    def _judge(self, metrics: dict[str, Any]) -> str | None:
        """Tell why to stop after an evaluation: the target is reached, or nothing improves any more."""
        stop = self.job.train.stop
        target = stop.target
        if target is not None and target.reached(metrics):
            return f"{target.metric} reached its target"
        if stop.patience is None:
            return None
        value = -metrics[stop.metric] if stop.minimise else metrics[stop.metric]
        if self.standing.best is None or value > self.standing.best + stop.min_delta:
            self.standing.best, self.standing.stale = value, 0
        else:
            self.standing.stale += 1
        stale = self.standing.stale >= stop.patience
        return f"{stop.metric} has not improved in {stop.patience} evaluations" if stale else None

    def _agreed_reason(self) -> str:
        reasons = self.comm.allgather_object(self._asked)
        return next((reason for reason in reasons if reason), "asked to stop")

    def _score(self) -> Score | None:
        metric = self.job.train.checkpoint.best
        newest = self.last.get(self.parts.watched)
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
            self.method.params.layout,
            score=score,
            keep=self.job.train.checkpoint.keep,
            on_phase=self._on_phase,
        )
        self._saved_at = self.method.step

    def ask_to_stop(self, reason: str) -> None:
        """Ask all ranks to save and stop at the next commit point; local, and safe in a signal handler."""
        self._asked = reason
        self.method.request_stop()

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGUSR1 ask for a stop; only the main thread may, so elsewhere (LocalWorld) they do not."""
        before = {}
        with suppress(ValueError):
            for number in STOP_SIGNALS:
                name = signal.Signals(number).name
                before[number] = signal.signal(number, lambda *_, name=name: self.ask_to_stop(f"stopped by {name}"))
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

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
