"""Whether a run may go on with a job: one of the same steps, at the same rates, on the same data, not past its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpitrain._errors import JobError
from mpitrain.comm import Communicator
from mpitrain.comm.guard import agree
from mpitrain.train.assembly import Assembly
from mpitrain.train.checkpoint import Checkpoint
from mpitrain.train.facts import Facts
from mpitrain.train.job import Job
from mpitrain.train.rundir import RunDirectory

_MAY_CHANGE = (
    "name",
    "data.path",  # what is there is compared
    "data.weights",  # likewise
    "method.kind",  # the same steps, however they are divided
    "method.stage",
    "method.schedule",
    "method.chunks",
    "method.cuts",
    "method.bucket_bytes",
    "mesh",  # likewise
    "model.recompute",  # the same bits
    "train.steps",  # unless the learning rate depends on it
    "train.epochs",  # likewise
    "train.log_every_steps",
    "train.checkpoint",
    "train.stop",
)
_PATHS_OF_NPY = ("data.options.inputs", "data.options.targets")  # as data.path, which this source does not have


def check_same_job(job: Job, run: Path) -> None:
    """Refuse to continue a run with a job that would train differently."""
    changed = differences(job, run)
    if changed:
        raise JobError(
            "the job is not the one that the run was started with", operation=f"resume {run}", got=changed,
            remedy=f"resume with {run / 'job.toml'}, or start anew with train.warm_start",
        )  # fmt: skip


def differences(job: Job, run: Path) -> str:
    """Return what keeps a run from going on with a job, in words; empty if nothing does, or there is no run."""
    path = run / "job.toml"
    if not path.is_file():
        return ""
    begun = Job.load(path)
    before, now = _flat(begun.model_dump()), _flat(job.model_dump())
    may_change = _MAY_CHANGE + (_PATHS_OF_NPY if job.data.source == "npy" else ())
    changed = [
        f"{key} = {now.get(key)!r}, the run has {before.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not key.startswith(may_change)
    ]
    return "; ".join(changed[:5]) or _stretched(job, begun)


def _stretched(job: Job, begun: Job) -> str:
    """Return how a cosine that a run has begun would change with the length of the job, in words; empty if not.

    With other schedules a run may go on for longer: the rates of the steps that were taken stay what they were.
    """
    if job.optimizer.schedule.kind != "cosine":
        return ""
    lengths = [(key, getattr(job.train, key), getattr(begun.train, key)) for key in ("epochs", "steps")]
    changed = [f"train.{key} = {new!r}, the run has {old!r}" for key, new, old in lengths if new != old]
    return f"{'; '.join(changed)}, which its cosine schedule runs over" if changed else ""


def check_not_past_the_end(parts: Assembly, saved: Checkpoint, comm: Communicator) -> None:
    """Refuse to continue a run that has taken more steps than the job: its result would not be the job's."""
    with agree(comm):
        if comm.rank == 0 and saved.step > parts.steps:
            raise JobError(
                "the run is past the end of the job", operation=f"resume {saved.path.parent.parent}",
                got=f"step {saved.step}", expected=f"at most the job's {parts.steps} steps",
                remedy="leave train.steps or train.epochs as they were, or start anew",
            )  # fmt: skip


def check_same_data(parts: Assembly, directory: RunDirectory, comm: Communicator) -> None:
    """Refuse to continue a run on other data, wherever they lie now; compared is what the run has kept of its own."""
    with agree(comm):
        others = _others(directory, parts.samples.facts.digests) if comm.rank == 0 else []
        if others:
            raise JobError(
                "the data are not those that the run was started with", operation=f"resume {directory.path}",
                got=f"others for {', '.join(others)}", remedy="restore them, or start anew with train.warm_start",
            )  # fmt: skip


def _others(directory: RunDirectory, now: Mapping[str, str]) -> list[str]:
    """Return the names of what a run has read otherwise; held-out sets that it kept nothing of are passed over."""
    kept = Facts.read(directory.path).digests
    names = [*kept, *({"weights"} & now.keys() - kept.keys())]
    return [name for name in names if kept.get(name) != now.get(name)]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found
