"""From a job's words to all of its parts, set up: data, model, optimizer, method, and when what is due.

Every rank builds the same parts by itself; it communicates only to compare what was read, and in the method's set-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import floor, log2, prod
from typing import Any

import numpy as np

from mpitrain import optim
from mpitrain._errors import JobError
from mpitrain.arrays import Batch, Key, device
from mpitrain.arrays.gpus import use_gpu
from mpitrain.comm import Communicator, ProcessMesh
from mpitrain.comm.codecs import make_codec
from mpitrain.data import Batches
from mpitrain.method import Method, Plan, Precision
from mpitrain.method.steps import check_same
from mpitrain.nn import Model
from mpitrain.parallel import (
    DataParallel,
    GradientParallel,
    GradientPipelineParallel,
    ModelAveraging,
    PipelineParallel,
    ReproducibleDataParallel,
    ReproducibleGradientParallel,
    ReproducibleGradientPipelineParallel,
    ReproduciblePipelineParallel,
    Synchronous,
)
from mpitrain.train.cadence import Cadence
from mpitrain.train.cutting import cut_words, cutting
from mpitrain.train.facts import Facts
from mpitrain.train.job import Job
from mpitrain.train.job.fit import SHORTER_WARMUP
from mpitrain.train.mesh import Axes, axes_of
from mpitrain.train.models import build_model
from mpitrain.train.samples import Samples, evaluation_batches, global_batches, load_samples


@dataclass(frozen=True)
class Assembly:
    """The parts of a job, ready to train.

    Parameters
    ----------
    title : str
        One line for people.
    samples : Samples
        The data.
    feed : Batches
        Batches for the method.
    model : Model
        What is trained.
    method : Method
        Set up, at step 0.
    steps, steps_per_epoch : int
        Length of the run, and of an epoch.
    cadence : Cadence
        When to log, evaluate and save.
    held_out : dict of str to callable
        Gives this rank's batches of each held-out set.
    """

    title: str
    samples: Samples
    feed: Batches
    model: Model
    method: Method
    steps: int
    steps_per_epoch: int
    cadence: Cadence
    held_out: Mapping[str, Callable[[], Iterator[Batch]]]

    @property
    def watched(self) -> str:
        """The held-out set that is evaluated in training and steers it: ``"valid"`` if there is one, or ``"test"``."""
        return "valid" if "valid" in self.held_out else "test"


def assemble(job: Job, comm: Communicator, optimizer: optim.Optimizer | None = None) -> Assembly:
    """Build and set up the parts of a job.

    Parameters
    ----------
    optimizer : Optimizer, optional
        Used in place of the job's own (`job_optimizer`), e.g. one that records what it is handed.

    Raises
    ------
    MismatchError
        Ranks have read different rows or weights: a file differs between nodes, or ``data.build`` draws at random.
    MpitrainError
        The job and its data do not fit together; or it is for a GPU, and there is none.

    Notes
    -----
    Collective: all ranks must have read the same data, and the method verifies that they hold the same parameters.  Of
    the GPUs that the ranks of a node see, they take one each in turn.
    """
    if job.device == "gpu":
        use_gpu(comm.node.rank)
    samples = load_samples(job)
    check_same(comm, _read(samples.facts), "ranks have read different data", "data")
    feed, axes = global_batches(job, samples), axes_of(job, comm)
    _check_lanes(job, feed)
    model = build_model(job, samples.facts, axes.tensor)
    method = _method(job, axes, model, samples.facts, feed)
    steps_per_epoch = feed.share(*method.shares[0], job.method.microbatches).steps_per_epoch
    steps = job.train.steps or (job.train.epochs or 1) * steps_per_epoch
    method.setup(model, optimizer or job_optimizer(job), _plan(job, feed.batch_size, steps))
    batches = partial(evaluation_batches, dtype=job.dtype, shares=method.evaluation_shares)
    held_out = {kind: partial(batches, part) for kind, part in samples.held_out.items()}
    title = (
        f"{job.name}: {model.layout.global_parameter_count:,} parameters, {len(samples.train):,} samples, "
        f"batches of {feed.batch_size}, {steps:,} steps on {_ranks(comm, axes)}{cut_words(job, method)}{_passes(job)}"
    )
    cadence = _cadence(job, steps, steps_per_epoch)
    parts = Assembly(title, samples, feed, model, method, steps, steps_per_epoch, cadence, held_out)
    _check_metrics(job, parts, islice(held_out[parts.watched](), len(method.evaluation_shares)))
    return parts


def _read(facts: Facts) -> str:
    """Tell apart what was read, in some digits for each part."""
    return ", ".join(f"{name} {digest[:12]}" for name, digest in facts.digests.items())


def _ranks(comm: Communicator, axes: Axes) -> str:
    return f"{comm.size} rank{'s' if comm.size > 1 else ''}{axes.words and f', {axes.words}'}"


def _passes(job: Job) -> str:
    precision = job.precision
    if not precision.mixed:
        return ""
    return f", passes in {precision.compute}{', which the CPU emulates' if job.device == 'cpu' else ''}"


def _check_lanes(job: Job, feed: Batches) -> None:
    if job.lanes is not None and job.lanes > feed.batch_size:  # a "full" batch is known by now
        raise JobError(
            "is more than the samples of a batch",
            operation="lanes",
            got=job.lanes,
            expected=f"at most {feed.batch_size}",
        )


def _check_metrics(job: Job, parts: Assembly, batches: Iterator[Batch]) -> None:
    """Refuse, before the first step, metrics that the model does not give, as one evaluated batch shows."""
    stop = job.train.stop
    named = {"train.checkpoint.best": job.train.checkpoint.best}
    named |= {"train.stop.metric": stop.metric} if stop.patience else {}
    named |= {"train.stop.target.metric": stop.target.metric} if stop.target else {}
    given = single_numbers(parts.method.evaluate(batches))
    for key, metric in named.items():
        if metric not in given:
            expected = " or ".join(sorted(given))
            raise JobError("the model gives no such metric", operation=key, got=metric, expected=expected)


def single_numbers(metrics: Mapping[str, Any]) -> dict[str, int | float]:
    """Return the metrics that are single numbers, as Python's."""
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in metrics.items()}
    return {name: value for name, value in plain.items() if isinstance(value, int | float)}


def job_optimizer(job: Job) -> optim.Optimizer:
    """Return the optimizer of a job."""
    section = job.optimizer
    options = section.model_dump(exclude={"kind", "lr", "schedule", "clip_norm", "clip_value"})
    return optim.make_optimizer(section.kind, **options)


def _plan(job: Job, batch_size: int, steps: int) -> Plan:
    section, schedule = job.optimizer, job.optimizer.schedule
    lr = section.lr
    if schedule.scale_with_batch_from:
        lr = optim.linear_scaling(lr, batch_size, schedule.scale_with_batch_from)
    options = schedule.model_dump(exclude={"kind", "scale_with_batch_from"})
    if schedule.kind == "cosine":
        options["steps"] = max(1, steps - schedule.warmup_steps)
    if schedule.warmup_steps >= steps:
        raise JobError(
            "leaves no step after the warm-up", operation="optimizer.schedule.warmup_steps", got=schedule.warmup_steps,
            expected=f"less than the run's {steps} steps", remedy=SHORTER_WARMUP,
        )  # fmt: skip
    course = optim.make_schedule(schedule.kind, lr=lr, **options)
    return Plan(Key(job.seed), course, steps, section.clip_norm, section.clip_value)


def _method(job: Job, axes: Axes, model: Model, facts: Facts, feed: Batches) -> Synchronous:
    section, on_gpu, precision = job.method, job.device == "gpu", _precision(job, facts, feed.batch_size)
    if axes.pipes:
        whole = build_model(job, facts) if axes.tensor else model
        return _pipeline(job, axes.pipes, cutting(job, axes.pipes, model, whole, feed, precision), precision)
    if job.lanes is not None:
        made = ReproducibleGradientParallel if section.kind == "gradient" else ReproducibleDataParallel
        return made(axes.data, lanes=job.lanes, microbatches=section.microbatches, precision=precision)
    options: dict[str, Any] = {"microbatches": section.microbatches, "bucket_bytes": section.bucket_bytes}
    options |= {"precision": precision, "allocator": device if on_gpu else None}
    if section.kind == "gradient":
        return GradientParallel(axes.data, across=axes.tensor, stage=section.stage, **options)
    options["codec"] = make_codec(section.codec.kind, **section.codec.arguments()) if section.codec else None
    if section.average_every:
        return ModelAveraging(axes.data, average_every=section.average_every, **options)
    return DataParallel(axes.data, across=axes.tensor, **options)


def _precision(job: Job, facts: Facts, batch_size: int) -> Precision | None:
    section = job.precision
    if not section.mixed:
        return None
    options = section.model_dump(exclude={"initial_scale"})
    labels = batch_size * (prod(facts.sample_shape) if facts.task == "sequence" else 1)
    return Precision(**options, initial_scale=section.initial_scale or 2.0 ** floor(16 - log2(labels)))


def _pipeline(job: Job, mesh: ProcessMesh, cut: Mapping[str, Any], precision: Precision | None) -> Synchronous:
    """Return the method of a model in stages; ``cut``: see `cutting`."""
    section = job.method
    options: dict[str, Any] = {
        "schedule": section.schedule,
        "chunks": section.chunks,
        "microbatches": section.microbatches,
        **cut,
        "allocator": device if job.device == "gpu" else None,
        "precision": precision,
    }
    divides = section.kind == "gradient"
    if job.lanes is not None:
        made = ReproducibleGradientPipelineParallel if divides else ReproduciblePipelineParallel
        return made(mesh, lanes=job.lanes, **options)
    if divides:
        return GradientPipelineParallel(mesh, **options)
    return PipelineParallel(mesh, bucket_bytes=section.bucket_bytes, **options)


def _cadence(job: Job, steps: int, steps_per_epoch: int) -> Cadence:
    train, saving = job.train, job.train.checkpoint
    return Cadence(
        steps,
        {
            "log": train.log_every_steps,
            "evaluate": train.evaluate_every_steps or (train.evaluate_every_epochs or 1) * steps_per_epoch,
            "checkpoint": saving.every_steps or (saving.every_epochs or 1) * steps_per_epoch,
        },
    )
