"""The steps that all methods share, in their one order: reduce, divide, check, clip, update.

Each works on a contiguous shard of the flat range, which for data-parallel SGD is all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mpitrain._errors import MismatchError, NonFiniteError
from mpitrain._typing import Array
from mpitrain.arrays import FlatBuffer, Shard, namespace
from mpitrain.comm import Communicator
from mpitrain.method.method import Plan
from mpitrain.optim import Optimizer, State, clip_value, finite, scale, squared_norm


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


def check_finite(
    comm: Communicator, good: bool, grads: Array, shard: Shard, step: int, own_part_finite: Callable[[], bool]
) -> None:
    """End the run if the loss or gradient of a step is not finite.

    Parameters
    ----------
    good : bool
        The verdict, which must be the same on all ranks.
    grads : array, shape (shard.size,)
        The gradient that was judged; it may differ between ranks.
    own_part_finite : callable
        Tells whether what this rank's samples gave was finite; called only to name the culprits, so it may be slow and
        overwrite ``grads``.

    Raises
    ------
    NonFiniteError
        The same on all ranks, naming the step, the ranks at fault, and the tensors.
    """
    if good:
        return
    bad = {number for number, part in shard.pieces if not finite(grads[part])}
    findings = comm.allgather_object((own_part_finite(), bad))
    ranks = [rank for rank, (well, _) in enumerate(findings) if not well]
    names = [shard.layout.segments[number].name for number in sorted(set().union(*(found for _, found in findings)))]
    raise NonFiniteError(
        f"the loss or gradient of step {step} is not finite",
        got=f"ranks whose own samples gave it: {ranks or 'none'}; tensors: {', '.join(names) or 'none'}",
        remedy="lower optimizer.lr, or set optimizer.clip_norm",
    )


def clip(grads: Array, shard: Shard, plan: Plan, comm: Communicator | None = None) -> None:
    """Clip mean gradients in place, by value and then by global norm.

    Parameters
    ----------
    comm : Communicator, optional
        Over which the squared norms of the shards are summed (collective); None if the shard is everything.
    """
    if plan.clip_value is not None:
        clip_value(grads, shard, plan.clip_value)
    if plan.clip_norm is not None:
        partial = squared_norm(grads, shard)
        total = float(comm.allreduce(np.float64(partial))) if comm else partial
        norm = float(np.sqrt(total))
        if norm > plan.clip_norm:
            scale(grads, shard, plan.clip_norm / norm)


def update(
    optimizer: Optimizer, params: Array, grads: Array, state: State, plan: Plan, step: int, shard: Shard,
    comm: Communicator | None = None,
) -> None:  # fmt: skip
    """Run the optimizer on one shard; ``comm`` sums what it needs of whole tensors, as in `clip`."""
    totals = optimizer.partials(params, grads, state, step, shard)
    if totals is not None and comm is not None:
        totals = comm.allreduce(totals)
    optimizer.update(params, grads, state, plan.schedule(step), step, shard, totals)


def divide(grads: Array, count: float) -> None:
    """Turn summed gradients into mean ones: the one division of a step."""
    xp = namespace(grads)
    xp.divide(grads, grads.dtype.type(count), out=grads)


def add_sums(total: dict[str, Array] | None, sums: Mapping[str, Array]) -> dict[str, Array]:
    """Add a batch's evaluation sums to those of the batches before it."""
    if total is None:
        return {name: np.array(value, np.float64) for name, value in sums.items()}
    return {name: total[name] + sums[name] for name in total}
