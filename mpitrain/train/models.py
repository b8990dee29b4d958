"""A job's model: a preset, or what the user's own function builds, with the loss that fits the data."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from math import prod
from typing import Any

from mpitrain import adapters, nn
from mpitrain._errors import JobError
from mpitrain.adapters import is_torch_module
from mpitrain.arrays import Key
from mpitrain.comm import Communicator
from mpitrain.nn import Layer, Loss, Model, Network
from mpitrain.parallel.tensor import divided_network
from mpitrain.train.facts import Facts
from mpitrain.train.job import Job
from mpitrain.train.job.model import LOSS_OF_TASK, BuiltModel
from mpitrain.train.job.userfile import call_object, load_object


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
    load_object(section.build)
    with adapters.seeded(Key(seed, "init")) if "torch" in sys.modules else nullcontext():
        return call_object(section.build, section.options)


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
            return nn.MODELS[kind](_images(facts), outputs, **options)
    return nn.MODELS[kind](prod(facts.sample_shape), outputs, **options)


def _images(facts: Facts) -> tuple[int, ...]:
    """Return the shape of the samples, if they are images."""
    if len(facts.sample_shape) != 3:
        raise JobError(
            "needs images", operation='model.kind = "cnn"', got=f"samples of shape {facts.sample_shape}",
            expected="shape (height, width, channels)", remedy='or set model.kind = "mlp"',
        )  # fmt: skip
    return facts.sample_shape


def _context(facts: Facts) -> int:
    """Return the length of the windows of a text."""
    if facts.task != "sequence" or len(facts.sample_shape) != 1:
        raise JobError(
            "needs windows of tokens", operation='model.kind = "gpt"',
            got=f"{facts.task}, samples of shape {facts.sample_shape}", expected="sequence, shape (context,)",
        )  # fmt: skip
    return facts.sample_shape[0]


def _loss(job: Job, facts: Facts) -> Loss:
    name = job.model.loss or LOSS_OF_TASK[facts.task]
    if name == "cross_entropy" and facts.task == "sequence":
        return nn.CrossEntropy(unit=job.data.unit)
    if ":" not in name:
        return nn.LOSSES[name]()
    built = call_object(name, {})
    if not isinstance(built, Loss):
        raise JobError("model.loss gave no loss", operation=name, got=type(built).__name__, expected="mpitrain.nn.Loss")
    return built
