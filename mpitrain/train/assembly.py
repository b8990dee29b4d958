"""From a job's words to its parts: data, model, optimizer, method, and when what is due.

Every rank builds the same parts by itself; the only communication is the method's own set-up.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice
from math import floor, log2, prod
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain import adapters, data, nn, optim
from mpitrain._errors import DataError, JobError
from mpitrain._typing import Array
from mpitrain.adapters import is_torch_module
from mpitrain.arrays import Batch, Key, device, plain
from mpitrain.comm import Communicator, ProcessMesh
from mpitrain.comm.codecs import make_codec
from mpitrain.data import Batches, Dataset, Standardise
from mpitrain.method import Method, Plan, Precision
from mpitrain.nn import Layer, Loss, Model, Network
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
from mpitrain.parallel.tensor import divided_network
from mpitrain.train.cadence import Cadence
from mpitrain.train.cutting import cut_words, cutting
from mpitrain.train.facts import Facts
from mpitrain.train.job import Job
from mpitrain.train.job.model import LOSS_OF_TASK, BuiltModel
from mpitrain.train.job.userfile import load_object
from mpitrain.train.mesh import Axes, axes_of

_EVALUATION_ROWS = 1024


@dataclass(frozen=True)
class Samples:
    """A job's data: the parts, and what was done to the inputs."""

    train: Dataset
    held_out: dict[str, Dataset]  # by kind: "valid" if the job asks for it, and "test"
    standardise: Standardise | None

    @cached_property
    def facts(self) -> Facts:
        """What the model must know of them."""
        return Facts.of(self.train, self.standardise)


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
    watched : str
        The held-out set that is evaluated while training: ``"valid"`` if there is one, else ``"test"``.
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
        """The held-out set that steers the run."""
        return "valid" if "valid" in self.held_out else "test"


def assemble(job: Job, comm: Communicator, optimizer: optim.Optimizer | None = None) -> Assembly:
    """Build and set up the parts of a job.

    Parameters
    ----------
    optimizer : Optimizer, optional
        Taken instead of the job's own (`job_optimizer`), e.g. one that looks on.

    Raises
    ------
    MpitrainError
        The job and its data do not fit together.

    Notes
    -----
    Collective: the method verifies that all ranks hold the same parameters.
    """
    samples = load_samples(job)
    feed, axes = _batches(job, samples.train), axes_of(job, comm)
    _check_lanes(job, feed)
    model = build_model(job, samples.facts, axes.tensor)
    method = _method(job, axes, model, samples.facts, feed)
    steps_per_epoch = feed.share(*method.shares[0], job.method.microbatches).steps_per_epoch
    steps = job.train.steps or (job.train.epochs or 1) * steps_per_epoch
    method.setup(model, optimizer or job_optimizer(job), _plan(job, feed.batch_size, steps))
    batches = partial(_evaluation_batches, dtype=job.dtype, shares=method.evaluation_shares)
    held_out = {kind: partial(batches, part) for kind, part in samples.held_out.items()}
    title = (
        f"{job.name}: {model.layout.global_parameter_count:,} parameters, {len(samples.train):,} samples, "
        f"batches of {feed.batch_size}, {steps:,} steps on {_ranks(comm, axes)}{cut_words(job, method)}{_passes(job)}"
    )
    cadence = _cadence(job, steps, steps_per_epoch)
    parts = Assembly(title, samples, feed, model, method, steps, steps_per_epoch, cadence, held_out)
    _check_metrics(job, parts, islice(held_out[parts.watched](), len(method.evaluation_shares)))
    return parts


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


def _evaluation_batches(dataset: Dataset, dtype: str, shares: Sequence[tuple[int, int]]) -> Iterator[Batch]:
    """Walk over a held-out set: of each batch, give this rank's shares in turn."""
    walks = [data.evaluation_batches(dataset, _EVALUATION_ROWS, *share, dtype=dtype) for share in shares]
    return chain.from_iterable(zip(*walks, strict=True))


def _check_metrics(job: Job, parts: Assembly, batches: Iterator[Batch]) -> None:
    """Refuse, before the first step, names of metrics that an evaluation of one batch does not give."""
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


def load_samples(job: Job) -> Samples:
    """Read the data set, hold parts of it out, and standardise by the rest."""
    section = job.data
    whole = _dataset(job)
    if section.folds:
        train, test = list(data.folds(whole, section.folds, seed=job.seed, stratified=section.stratified))[section.fold]
    else:
        train, test = _cut(whole, section.test, job)
    held_out = {"test": test}
    if section.valid:
        train, valid = _cut(train, section.valid / (1 - section.held_out), job)
        held_out = {"valid": valid, "test": test}
    if not section.standardise:
        return Samples(train, held_out, None)
    standardise = Standardise.fit(train)
    return Samples(standardise(train), {kind: standardise(part) for kind, part in held_out.items()}, standardise)


def _cut(dataset: Dataset, fraction: float, job: Job) -> tuple[Dataset, Dataset]:
    """Hold out a fraction of the rows."""
    if job.data.hold_out == "end":
        return data.split_end(dataset, fraction)
    return data.split(dataset, fraction, seed=job.seed, stratified=job.data.stratified)


def _dataset(job: Job) -> Dataset:
    section = job.data
    if section.build:
        found = _built(section.build, section.options)
        if not isinstance(found, Dataset):
            raise JobError(
                "data.build gave no data set", operation=section.build, got=type(found).__name__,
                expected="mpitrain.Dataset",
            )  # fmt: skip
        found.check()
        return found
    return data.load(section.source, section.arguments())


def _batches(job: Job, train: Dataset) -> Batches:
    section = job.data
    return Batches(
        train,
        len(train) if job.train.batch_size == "full" else job.train.batch_size,
        job.seed,
        owners=None if section.partition == "none" else section.partition,
        owner_options=section.partition_options.model_dump(exclude_none=True),
        sampling=section.sampling,
        sampling_weights=_sampling_weights(job),
        drop_last=job.train.drop_last,
        dtype=job.dtype,
    )


def _sampling_weights(job: Job) -> Array | None:
    if job.data.weights is None:
        return None
    try:
        weights: Array = np.load(job.data.weights, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{job.data.weights}: cannot be read", got=str(error), expected="a .npy file") from error
    return weights


def build_model(job: Job, facts: Facts, tensor: Communicator | None = None) -> Model:
    """Return the model of a job, sized for its data; with ``tensor``, this rank's part of it."""
    section = job.model
    built: Any = _preset(job, facts)
    if isinstance(section, BuiltModel):
        built = _built_model(section, job.seed)
    if isinstance(built, Layer):
        loss = _loss(job, facts)
        return (
            divided_network(built, loss, tensor, job.dtype, job.mesh.sequence_parallel)
            if tensor else Network(built, loss, job.dtype)
        )  # fmt: skip
    if isinstance(built, Model):
        return built
    if is_torch_module(built):
        return adapters.TorchModel(built, _loss(job, facts), job.dtype)
    if isinstance(built, tuple) and len(built) == 2 and is_torch_module(built[0]):
        return adapters.TorchModel(*built, job.dtype)
    raise JobError(
        "model.build gave no model", operation=str(getattr(section, "build", section.kind)), got=type(built).__name__,
        expected="mpitrain.Layer, mpitrain.Model, torch.nn.Module, or (torch.nn.Module, loss)",
    )  # fmt: skip


def _built_model(section: BuiltModel, seed: int) -> Any:
    """Call the user's function; where its file has imported PyTorch, with PyTorch's generator seeded by the job."""
    load_object(section.build, Path())
    with adapters.seeded(Key(seed, "init")) if "torch" in sys.modules else nullcontext():
        return _built(section.build, section.options)


def _preset(job: Job, facts: Facts) -> Layer | None:
    kind, options = job.model.kind, job.model.model_dump(exclude={"kind", "loss"})
    outputs = 1 if job.model.loss == "bce" else facts.outputs
    match kind:
        case "build":
            return None
        case "bigram":
            return nn.MODELS[kind](outputs)
        case "gpt":
            return nn.MODELS[kind](outputs, _context(facts), **options)
        case "cnn":
            return nn.MODELS[kind](facts.sample_shape, outputs, **options)
    return nn.MODELS[kind](prod(facts.sample_shape), outputs, **options)


def _context(facts: Facts) -> int:
    """Return the length of the windows of a text."""
    if facts.task != "sequence" or len(facts.sample_shape) != 1:
        raise JobError(
            "needs windows of tokens", operation='model.kind = "gpt"',
            got=f"{facts.task}, samples of shape {facts.sample_shape}", expected="sequence, shape (context,)",
        )  # fmt: skip
    return facts.sample_shape[0]


def _built(spec: str, options: Mapping[str, Any]) -> Any:
    """Return what the user's own function gives."""
    function = load_object(spec, Path())
    try:
        inspect.signature(function).bind(**options)
    except (TypeError, ValueError) as error:
        got = ", ".join(options) or "no options"
        raise JobError(f"cannot be called with the job's options: {error}", operation=spec, got=got) from error
    return function(**options)


def _loss(job: Job, facts: Facts) -> Loss:
    name = job.model.loss or LOSS_OF_TASK[facts.task]
    if name == "cross_entropy" and facts.task == "sequence":
        return nn.CrossEntropy(unit=job.data.unit)
    if ":" not in name:
        return nn.LOSSES[name]()
    built = _built(name, {})
    if not isinstance(built, Loss):
        raise JobError("model.loss gave no loss", operation=name, got=type(built).__name__, expected="mpitrain.nn.Loss")
    return built


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
            "optimizer.schedule.warmup_steps leaves no step after the warm-up", got=schedule.warmup_steps,
            expected=f"less than the run's {steps} steps",
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
    comm, options["precision"] = axes.data, precision
    if section.kind == "gradient":
        return GradientParallel(
            comm, across=axes.tensor, stage=section.stage, allocator=device if on_gpu else None, **options
        )
    options["codec"] = make_codec(section.codec.kind, **section.codec.arguments()) if section.codec else None
    options["allocator"] = device if on_gpu else plain
    if section.average_every:
        return ModelAveraging(comm, average_every=section.average_every, **options)
    return DataParallel(comm, across=axes.tensor, **options)


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


__all__ = ["Assembly", "Samples", "assemble", "build_model", "job_optimizer", "load_samples", "single_numbers"]


def _precision(job: Job, facts: Facts, batch_size: int) -> Precision | None:
    section = job.precision
    if not section.mixed:
        return None
    options = section.model_dump(exclude={"initial_scale"})
    labels = batch_size * (prod(facts.sample_shape) if facts.task == "sequence" else 1)
    return Precision(**options, initial_scale=section.initial_scale or 2.0 ** floor(16 - log2(labels)))
