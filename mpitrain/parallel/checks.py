"""Whether what users hand to a method is what it takes, in one clear line if not."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

from mpitrain._errors import InputError
from mpitrain._options import check_kind
from mpitrain.arrays import Batch
from mpitrain.comm import Communicator
from mpitrain.method.method import Plan, Share
from mpitrain.nn.model import Model
from mpitrain.optim import Optimizer


def checked(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches, once it is seen that they are some."""
    expected = "batches, as evaluation_batches(dataset, 64, comm.rank, comm.size) gives"
    check_kind("evaluate", "batches", batches, Iterable, expected)
    for batch in batches:
        check_kind("evaluate", "one of batches", batch, Batch, expected)
        yield batch


def check_ranks(operation: str, comm: object, across: object) -> None:
    """Raise an InputError unless these are the ranks that share batches, and perhaps those that divide the model."""
    expected = "a Communicator, e.g. mpitrain.world(); Communicator.from_mpi(comm) makes one of mpi4py's"
    check_kind(operation, "comm", comm, Communicator, expected)
    check_kind(operation, "across", across, (Communicator, type(None)), expected)


def check_parts(model: object, optimizer: object, plan: object) -> None:
    """Raise an InputError unless a method can be set up with these."""
    models = "a Model, e.g. Network(layer, loss), mpitrain.adapters.TorchModel(module, loss) or JaxModel(…)"
    check_kind("setup", "model", model, Model, models)
    check_kind("setup", "optimizer", optimizer, Optimizer, "an Optimizer of mpitrain.optim, e.g. Adam()")
    check_kind("setup", "plan", plan, Plan, "a Plan(Key(seed=0), Constant(lr=1e-3), steps=100)")


def microbatches_of(share: Share, step: int, microbatches: int) -> list[Batch]:
    """Return what a share, perhaps a user's, gives for a step, once it is seen to be a batch a microbatch.

    Passes take part in collectives: a rank with fewer of them than the others would answer theirs with its next ones.
    """
    found = list(share.batch(step))
    if len(found) != microbatches:
        raise InputError(
            f"the feed's share of step {step + 1} is not a Batch for each microbatch", operation="advance",
            got=len(found), expected=microbatches, remedy="where a microbatch has no samples, give a Batch of none",
        )  # fmt: skip
    return found


def two_numbers(found: Any) -> tuple[float, float]:
    """Return what a model, perhaps a user's, gave as loss and count."""
    try:
        loss_sum, count = map(float, found)
    except (TypeError, ValueError) as error:
        raise InputError(
            "the model's loss_and_gradients gave no loss", got=reprlib.repr(found),
            expected="(loss_sum, count), two numbers",
        ) from error  # fmt: skip
    if count < 0:
        raise InputError("the model's count is negative", got=count, expected="what the loss is to be divided by")
    return loss_sum, count
