"""A whole run, from a job file to its result: what the command line calls, and research code may."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

from mpitrain._errors import InputError, JobError
from mpitrain.comm import Communicator
from mpitrain.comm.guard import agree
from mpitrain.comm.threads import set_blas_threads
from mpitrain.comm.tracing import trace
from mpitrain.train import checkpoint
from mpitrain.train.assembly import Assembly, assemble, single_numbers
from mpitrain.train.checkpoint import Checkpoint, OnPhase
from mpitrain.train.cutting import cut_facts
from mpitrain.train.environment import describe_environment
from mpitrain.train.fingerprint import Fingerprint, agreed_fingerprint, changes, fingerprint
from mpitrain.train.job import Job
from mpitrain.train.observer import Observer
from mpitrain.train.report import write_report
from mpitrain.train.resumption import check_not_past_the_end, check_same_data, check_same_job
from mpitrain.train.rundir import RunDirectory
from mpitrain.train.signals import NameSignal, own_name, stop_on_signals
from mpitrain.train.storage import alone
from mpitrain.train.trainer import Trainer


def load_job(path: str | PathLike[str], overrides: Iterable[str], comm: Communicator) -> Job:
    """Read a job file on rank 0 and give it to all ranks.

    Raises
    ------
    JobError
        On rank 0; `PeerError` on the others.

    Notes
    -----
    Collective over ``comm``.
    """
    text = ""
    with agree(comm):
        if comm.rank == 0:
            text = Job.load(path, overrides).to_toml()
    return Job.from_toml(comm.broadcast_object(text), path)


def train_job(
    job: Job,
    comm: Communicator,
    *,
    run_dir: str | PathLike[str] | None = None,
    resume: str | PathLike[str] | None = None,
    observer: Observer | None = None,
    on_phase: OnPhase | None = None,
    traced: bool = False,
    blas_threads: int | None = None,
    report: bool = True,
    name_signal: NameSignal = own_name,
) -> dict[str, Any]:
    """Train a job, keep the run, and return its result.

    Parameters
    ----------
    job : Job
        What to run; the same on all ranks.
    comm : Communicator
        On which ranks.
    run_dir : path, optional
        Where the run is kept: missing or empty.  Default: a new directory under ``runs/NAME``.
    resume : path, optional
        Directory of a run to continue from its newest checkpoint.
    observer : Observer, optional
        Told what happens on this rank.
    on_phase : callable, optional
        Told each phase of writing a checkpoint.
    traced : bool
        Write the timeline of all ranks to ``trace.json`` in the run directory (see `mpitrain.trace`); one that is there
        is replaced.
    blas_threads : int, optional
        Threads of BLAS on each rank of a job that is not reproducible.  Default: its share of the node's CPUs, as if
        the ranks of ``comm`` were alone there.
    report : bool
        Write ``report.html``, which takes a second or two; ``mpitrain report`` can do so later.
    name_signal : callable
        Names a signal that stops the run, for the result.

    Returns
    -------
    dict
        What ``result.json`` holds: ``job, ranks, steps, seconds, loss, metrics, weights_sha256, run_dir, report,
        stopped, completed``, for a classification (not of the tokens of a text) ``confusion`` and ``classes``, of a
        pipeline ``cuts``, and in float16 ``loss_scale`` and ``skipped_steps``.  The same on all ranks.

    Notes
    -----
    Collective over ``comm``.
    """
    kept, begun = (None if each is None else Path(each) for each in (run_dir, resume))
    with agree(comm):
        if begun is not None and comm.rank == 0:
            check_same_job(job, begun)
    parts = assemble(job, comm)
    bits = settle_arithmetic(job, comm, blas_threads)
    with ExitStack() as held:
        directory = _to_go_on_with(begun, job, comm, held) if begun is not None else None
        if directory:
            check_same_data(parts, directory, comm)
        saved = _newest(directory, parts, comm) if directory else None
        if saved is None and job.train.warm_start:
            _warm_start(parts, Path(job.train.warm_start), comm)
        # a new directory is made when all else is well, so that nothing is left of a run that never began
        directory = directory or _new(kept, job, comm, held)
        trainer = Trainer(job, comm, parts, directory, observer, on_phase, name_signal)
        if saved is not None:
            check_not_past_the_end(parts, saved, comm)
            trainer.restore(saved)
        elif begun is not None:
            trainer.observer.on_note("the run has no checkpoint yet, and begins anew")
        with _recording(comm, trainer, directory) if traced else nullcontext():
            _keep_what_runs(job, comm, trainer, directory, bits)
            with stop_on_signals(trainer.stop_by_signal):  # to the end: launchers send more than one
                stopped = trainer.run()
                return _finish(job, comm, trainer, directory, stopped, report)


def _to_go_on_with(run: Path, job: Job, comm: Communicator, held: ExitStack) -> RunDirectory:
    """Return the directory of a run, which rank 0 holds before it cleans up what a crash has left half written."""
    with agree(comm):
        if comm.rank == 0 and run.is_dir():
            held.enter_context(alone(run))
    return RunDirectory.create(comm, job.name, resume=run)


def _new(path: Path | None, job: Job, comm: Communicator, held: ExitStack) -> RunDirectory:
    """Return a new directory, which rank 0 holds."""
    directory = RunDirectory.create(comm, job.name, path=path)
    with agree(comm):
        if comm.rank == 0:
            held.enter_context(alone(directory.path))
    return directory


def settle_arithmetic(job: Job, comm: Communicator, threads: int | None = None) -> Fingerprint | None:
    """Set the threads of BLAS, also of what came with the data set; return the fingerprint of a reproducible job.

    Notes
    -----
    Collective.  A reproducible job has one thread a rank, unless the user set a thread variable: with a share of the
    CPUs, the bits would depend on the number of ranks.
    """
    set_blas_threads(comm, 1 if job.reproducible else threads)
    if not job.reproducible:
        return None
    return agreed_fingerprint(comm, fingerprint(in_bfloat16=job.precision.compute == "bfloat16"))


def _recording(comm: Communicator, trainer: Trainer, directory: RunDirectory) -> AbstractContextManager[None]:
    return trace(directory.trace, comm, on_note=trainer.observer.on_note)


def _newest(directory: RunDirectory, parts: Assembly, comm: Communicator) -> Checkpoint | None:
    """Open the newest checkpoint of a run; None if the run was killed before its first one, and starts anew."""
    newest = _agreed_path(comm, lambda: checkpoint.latest(directory.checkpoints))
    return checkpoint.load(newest, comm, parts.model.layout) if newest else None


def _keep_what_runs(
    job: Job, comm: Communicator, trainer: Trainer, directory: RunDirectory, bits: Fingerprint | None
) -> None:  # fmt: skip
    """Write job and environment, and forget what came after the step at which training goes on."""
    environment = describe_environment(comm, comm.library) | {"from_step": trainer.method.step}
    if cut := cut_facts(job, trainer.method):
        environment["pipeline"] = cut
    with agree(comm):
        if comm.rank == 0:
            if bits is not None:
                environment["fingerprint"] = bits
                _tell_of_other_bits(directory, bits, trainer.observer)
            directory.rewind(trainer.method.step)
            trainer.parts.samples.facts.write(directory.path)
            directory.write_environment(environment)
            directory.write_job(job.model_dump(exclude_none=True))  # last: it makes the directory one of a run


def _tell_of_other_bits(directory: RunDirectory, bits: Fingerprint, observer: Observer) -> None:
    """Say so if a run goes on where other bits are to be expected than where it was before."""
    changed = changes(directory.read_fingerprint() or bits, bits)
    if changed:
        observer.on_note(f"not where the run was before, so that the bits may be others from here on: {changed}")


def _warm_start(parts: Assembly, run: Path, comm: Communicator) -> None:
    """Begin with another run's weights: its best checkpoint, with a new optimizer at step 0."""
    directory = RunDirectory(run).checkpoints
    found = _agreed_path(comm, lambda: checkpoint.best(directory) or checkpoint.latest(directory))
    if found is None:
        raise JobError(f"{run}: holds no checkpoint", operation="train.warm_start", expected="the directory of a run")
    parts.method.load_parameters(checkpoint.load(found, comm, parts.model.layout).read)


def _agreed_path(comm: Communicator, find: Callable[[], Path | None]) -> Path | None:
    """Return what rank 0 finds: another run may be writing there."""
    found: Path | None = None
    with agree(comm):
        if comm.rank == 0:
            found = find()
    path = comm.broadcast_object(str(found) if found else "")
    return Path(path) if path else None


def _finish(
    job: Job, comm: Communicator, trainer: Trainer, directory: RunDirectory, stopped: str, report: bool
) -> dict[str, Any]:  # fmt: skip
    """Evaluate once more, write result and, if wanted, report."""
    metrics = {kind: trainer.final(kind) for kind in trainer.parts.held_out}
    numbers = {
        f"{kind}_{name}": value
        for kind, found in metrics.items()
        for name, value in single_numbers(found).items()
        if name != "step"
    }
    result: dict[str, Any] = {
        "job": job.name,
        "ranks": comm.size,
        "steps": trainer.method.step,
        "seconds": round(trainer.standing.seconds, 3),
        "loss": trainer.standing.loss,
        "metrics": numbers,
        "weights_sha256": trainer.method.weights_sha256(),
        "run_dir": str(directory.path),
        "report": None,
        "stopped": stopped,
        "completed": trainer.completed,
    }
    if cut := cut_facts(job, trainer.method):
        result["cuts"] = cut["cuts"]
    if trainer.method.loss_scale is not None:
        result |= {"loss_scale": trainer.method.loss_scale, "skipped_steps": trainer.method.skipped}
    if "confusion" in metrics["test"] and trainer.parts.samples.facts.task != "sequence":
        result["confusion"] = metrics["test"]["confusion"].tolist()
        result["classes"] = list(trainer.parts.samples.train.class_names)
    return _keep(result, comm, directory, trainer.observer if report else None)


def _keep(
    result: dict[str, Any], comm: Communicator, directory: RunDirectory, observer: Observer | None
) -> dict[str, Any]:  # fmt: skip
    """Write the result, and if somebody observes it the report, which is made from the result and then named in it."""
    with agree(comm):
        if comm.rank == 0:
            directory.write_result(result)
            if observer is not None:
                with comm.phase("report"):
                    result["report"] = _report(directory, observer)
            keep = directory.finish if result["completed"] else directory.write_result
            keep(result)
    kept: dict[str, Any] = comm.broadcast_object(result)  # each rank has a clock of its own
    return kept


def _report(directory: RunDirectory, observer: Observer) -> str | None:
    try:
        return str(write_report(directory.path))
    except InputError as error:  # matplotlib is missing, or a file beside the run's own is damaged
        observer.on_note(f"no report: {error}")
        return None
