"""What the sections of a job must agree on: data with model, loss with task, optimizer with batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mpitrain.train.job.model import Gpt, Mlp
from mpitrain.train.job.section import Problem

if TYPE_CHECKING:
    from mpitrain.train.job.job import Job

SHORTER_WARMUP = "set optimizer.schedule.warmup_steps=0, or train longer"
"""What to do where the warm-up is no shorter than the run."""

_OF_SEQUENCES = ("bigram", "gpt")

_TASKS_OF_LOSS = {
    "bce": ("classification",),
    "cross_entropy": ("classification", "sequence"),
    "mse": ("regression",),
}


def misfits(job: Job) -> Iterator[Problem]:
    """Yield where two sections do not fit together."""
    yield from _model_and_data(job)
    yield from _loss_and_data(job)
    yield from _optimizer_and_batches(job)
    yield from _mesh_and_model(job)
    yield from _stages(job)
    yield from _mesh_and_method(job)
    yield from _reproducible(job)
    yield from _precision(job)


def _model_and_data(job: Job) -> Iterator[Problem]:
    known, kind, source = job.data.known, job.model.kind, job.data.source
    if known is None:
        return
    if kind == "cnn" and (not known.images or job.data.options.get("flat")):
        yield Problem("model.kind", f'needs images, which data.source = "{source}" does not give', kind)
    if kind == "gpt" and known.task == "sequence" and job.data.options.get("context", 1) == 1:
        yield Problem("data.options.context", 'is too small for model.kind = "gpt"', 1, "windows of 2 tokens or more")
    if (kind in _OF_SEQUENCES) != (known.task == "sequence") and kind != "build":
        expected = '"bigram", "gpt" or "build"' if known.task == "sequence" else '"linear" or "mlp"'
        yield Problem("model.kind", f'does not fit data.source = "{source}"', kind, expected)


def _loss_and_data(job: Job) -> Iterator[Problem]:
    known, loss = job.data.known, job.model.loss
    tasks = _TASKS_OF_LOSS.get(loss or "")
    if known is None or tasks is None:
        return
    if known.task not in tasks:
        yield Problem("model.loss", f'does not fit data.source = "{job.data.source}", a {known.task}', loss)
    elif loss == "bce" and known.classes != 2:
        what = f'needs 2 classes, data.source = "{job.data.source}" has {known.classes}'
        yield Problem("model.loss", what, loss, '"cross_entropy"')


def _optimizer_and_batches(job: Job) -> Iterator[Problem]:
    batch_size, steps, warmup = job.train.batch_size, job.train.steps, job.optimizer.schedule.warmup_steps
    if job.optimizer.kind == "gd" and batch_size != "full":
        remedy = 'or set optimizer.kind = "sgd"'
        yield Problem("train.batch_size", 'does not fit optimizer.kind = "gd"', batch_size, '"full"', remedy)
    if steps is not None and warmup >= steps:
        expected = f"less than train.steps = {steps}"
        what = "leaves no step after the warm-up"
        yield Problem("optimizer.schedule.warmup_steps", what, warmup, expected, SHORTER_WARMUP)
    microbatches = job.method.microbatches
    if batch_size != "full" and microbatches > batch_size:
        expected = f"at most train.batch_size = {batch_size}"
        yield Problem("method.microbatches", "is more than the samples of a batch", microbatches, expected)


def _mesh_and_model(job: Job) -> Iterator[Problem]:
    mesh, model = job.mesh, job.model
    if not mesh.divides_model:
        return
    if not isinstance(model, Gpt | Mlp):
        remedy = 'method.kind = "gradient" divides gradients and optimizer state of any model'
        what = f'cannot divide a model of kind "{model.kind}" (gpt and mlp can)'
        yield Problem("mesh.tensor", what, mesh.tensor, "1", remedy)
    elif isinstance(model, Gpt) and mesh.tensor > model.heads:
        yield Problem("mesh.tensor", "is more than the attention heads", mesh.tensor, f"at most {model.heads}")
    elif isinstance(model, Gpt) and (model.loss or "cross_entropy") != "cross_entropy":
        what = "is not for scores that ranks divide, as mesh.tensor > 1 does"
        yield Problem("model.loss", what, model.loss, '"cross_entropy"')
    elif mesh.sequence_parallel and not isinstance(model, Gpt):
        what = f'does not fit model.kind = "{model.kind}", which has no sequence'
        yield Problem("mesh.sequence_parallel", what, True, "false")


def _stages(job: Job) -> Iterator[Problem]:
    """Yield what a model in stages does not go with."""
    mesh, method = job.mesh, job.method
    if method.schedule != "1f1b" and method.kind != "pipeline" and mesh.pipe is None:
        expected = 'method.kind = "pipeline", or mesh.pipe'
        yield Problem("method.schedule", "is the order of a pipeline", method.schedule, expected)
    if method.cuts != "counted" and method.kind != "pipeline" and mesh.pipe is None:
        expected = 'method.kind = "pipeline", or mesh.pipe'
        yield Problem("method.cuts", "is where a pipeline is cut", method.cuts, expected)
    if not job.in_stages:
        return
    if method.cuts == "measured" and job.device == "gpu":
        yield Problem("method.cuts", "is timed on the CPU only", method.cuts, '"counted" or numbers of layers')
    if method.stage > 1:
        what = "does not go with mesh.pipe > 1, where gradients are complete only after the last microbatch"
        remedy = "1 divides the optimizer state of each stage; or leave out mesh.pipe"
        yield Problem("method.stage", what, method.stage, "1", remedy)
    if method.codec and method.kind != "pipeline":
        yield Problem("method.codec.kind", "does not go with mesh.pipe > 1", method.codec.kind, "no codec")
    if method.average_every and method.kind != "pipeline":
        yield Problem("method.average_every", "does not go with mesh.pipe > 1", method.average_every, "0")


def _mesh_and_method(job: Job) -> Iterator[Problem]:
    mesh, method = job.mesh, job.method
    if not mesh.divides_model:
        return
    if method.codec:
        yield Problem("method.codec.kind", "does not go with mesh.tensor > 1", method.codec.kind, "no codec")
    if method.average_every:
        yield Problem("method.average_every", "does not go with mesh.tensor > 1", method.average_every, "0")
    if mesh.sequence_parallel and method.stage > 1:
        what = f"does not go with method.stage = {method.stage}"
        yield Problem("mesh.sequence_parallel", what, True, "false, or method.stage = 1")
    if job.reproducible:
        yield Problem("reproducible", "does not go with mesh.tensor > 1", True, "false")


def _reproducible(job: Job) -> Iterator[Problem]:
    lanes, method, batch_size = job.lanes, job.method, job.train.batch_size
    if not job.reproducible:
        if lanes is not None:
            yield Problem("lanes", "is for jobs that are reproducible", lanes, "reproducible = true beside it")
        return
    if lanes is not None and batch_size != "full" and lanes > batch_size:
        yield Problem("lanes", "is more than the samples of a batch", lanes, f"at most train.batch_size = {batch_size}")
    if method.codec:
        what = "rounds by what each rank has, so that no run of reproducible = true may use it"
        yield Problem("method.codec.kind", what, method.codec.kind, "no codec")
    if method.average_every:
        what = "gives another model on every number of ranks, so that no run of reproducible = true may use it"
        yield Problem("method.average_every", what, method.average_every, "0")
    if method.stage == 3:
        yield Problem("method.stage", "does not go with reproducible = true", method.stage, "1 or 2")
    if job.device == "gpu":
        yield Problem("device", "is not shown to be reproducible yet", job.device, '"cpu"')


def _precision(job: Job) -> Iterator[Problem]:
    precision, method = job.precision, job.method
    if not precision.mixed:
        return
    compute = precision.compute
    if job.device == "cpu" and not precision.emulate:
        remedy = "CPUs train in float32: leave out [precision], or, for tests, set precision.emulate = true"
        yield Problem("precision.compute", 'needs device = "gpu"', compute, '"float32"', remedy)
    if job.dtype != "float32":
        yield Problem("dtype", f'does not go with precision.compute = "{compute}"', job.dtype, '"float32"')
    if method.codec and compute == "float16":
        what = 'keeps what it leaves out also of steps that overflow, as with precision.compute = "float16"'
        yield Problem("method.codec.kind", what, method.codec.kind, 'no codec, or precision.compute = "bfloat16"')
