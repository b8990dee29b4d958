"""The steps that all methods share, in their one order: reduce, check, divide, clip, update.

Each works on the parts of the flat range that a rank updates: all of it for data-parallel SGD, shards for others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mpitrain._errors import MismatchError, NonFiniteError
from mpitrain._typing import Array
from mpitrain.arrays import FlatBuffer, Shard, namespace
from mpitrain.comm import Communicator
from mpitrain.method.method import Plan
from mpitrain.optim import Optimizer, State, clip_value, finite, scale, squared_norm


@dataclass(frozen=True, eq=False)
class Part:
    """A contiguous part of a model that this rank updates.

    Parameters
    ----------
    shard : Shard
        Which part of the flat range.
    params, grads : array, shape (shard.size,)
        Its parameters, and where its reduced gradients are.
    state : dict of str to array
        What its optimizer keeps, see `Optimizer.init`.
    """

    shard: Shard
    params: Array
    grads: Array
    state: State


def verify_replicas(comm: Communicator, params: FlatBuffer) -> None:
    """Check that all ranks hold the same parameters.  Collective.

    Raises
    ------
    MismatchError
        Naming the ranks that differ from rank 0.
    """
    digests = comm.allgather_object(params.sha256())
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise MismatchError(
            "initial parameters differ between ranks",
            operation="setup",
            got=f"other values than rank 0's on ranks {differing}",
            remedy="a model's initialise() may depend on its key and the tensors' names alone",
        )


def reduce_gradients(comm: Communicator, grads: FlatBuffer, buckets: tuple[tuple[int, int], ...]) -> None:
    """Sum the gradients over all ranks, in place, bucket by bucket.  Collective."""
    for start, stop in buckets:
        bucket = grads.flat[start:stop]
        comm.allreduce(bucket, out=bucket)


def all_finite(parts: Sequence[Part]) -> bool:
    """Tell whether the gradients of all of this rank's parts are finite.  Local."""
    return all(finite(part.grads) for part in parts)


def check_finite(
    comm: Communicator, good: bool, parts: Sequence[Part], step: int, own_part_finite: Callable[[], bool]
) -> None:
    """End the run if the loss or gradient of a step is not finite.

    Parameters
    ----------
    good : bool
        The verdict, which must be the same on all ranks.
    parts : sequence of Part
        Whose gradients were judged; they may differ between ranks.
    own_part_finite : callable
        Tells whether what this rank's samples gave was finite; called only to name the culprits, so it may be slow.

    Raises
    ------
    NonFiniteError
        The same on all ranks, naming the step, the ranks at fault, and the tensors.
    """
    if good:
        return
    bad = {
        part.shard.layout.segments[number].name: None
        for part in parts
        for number, cut in part.shard.pieces
        if not finite(part.grads[cut])
    }
    findings = comm.allgather_object((own_part_finite(), bad))
    ranks = [rank for rank, (well, _) in enumerate(findings) if not well]
    names = list(dict(item for _, found in findings for item in found.items()))
    raise NonFiniteError(
        f"the loss or gradient of step {step} is not finite",
        got=f"ranks whose own samples gave it: {ranks or 'none'}; tensors: {', '.join(names) or 'none'}",
        remedy="lower optimizer.lr, or set optimizer.clip_norm",
    )


def divide(parts: Sequence[Part], count: float) -> None:
    """Turn summed gradients into mean ones: the one division of a step."""
    for part in parts:
        namespace(part.grads).divide(part.grads, part.grads.dtype.type(count), out=part.grads)


def clip(
    parts: Sequence[Part], plan: Plan, comm: Communicator | None = None, copies: Sequence[Part] = ()
) -> None:  # fmt: skip
    """Clip mean gradients in place, by value and then by global norm.

    Parameters
    ----------
    comm : Communicator, optional
        Over which the squared norms of the ranks' parts are summed (collective); None if these parts are everything.
    copies : sequence of Part
        What is clipped too, and belongs to the parts of another rank, where it counts in the norm.
    """
    if plan.clip_value is not None:
        for part in (*parts, *copies):
            clip_value(part.grads, part.shard, plan.clip_value)
    if plan.clip_norm is not None:
        partial = sum(squared_norm(part.grads, part.shard) for part in parts)
        total = float(comm.allreduce(np.float64(partial))) if comm else partial
        norm = float(np.sqrt(total))
        if norm > plan.clip_norm:
            for part in (*parts, *copies):
                scale(part.grads, part.shard, plan.clip_norm / norm)


def update(
    optimizer: Optimizer, parts: Sequence[Part], plan: Plan, step: int, comm: Communicator | None = None
) -> None:  # fmt: skip
    """Run the optimizer on every part; ``comm`` sums what it needs of whole tensors, as in `clip`."""
    partials = [optimizer.partials(each.params, each.grads, each.state, step, each.shard) for each in parts]
    needed = [partial for partial in partials if partial is not None]
    totals: Array | None = sum(needed[1:], start=needed[0]) if needed else None
    if totals is not None and comm is not None:
        totals = comm.allreduce(totals)
    lr = plan.schedule(step)
    for each in parts:
        optimizer.update(each.params, each.grads, each.state, lr, step, each.shard, totals)


def add_sums(total: dict[str, Array] | None, sums: Mapping[str, Array]) -> dict[str, Array]:
    """Add a batch's evaluation sums to those of the batches before it."""
    if total is None:
        return {name: np.array(value, np.float64) for name, value in sums.items()}
    return {name: total[name] + sums[name] for name in total}
