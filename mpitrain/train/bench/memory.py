"""What a method holds on a rank, by kind: measured on its arrays, and by the formulas of the methods."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays import FlatBuffer
from mpitrain.comm import Communicator
from mpitrain.nn import Network
from mpitrain.nn.costs import cost
from mpitrain.parallel.buckets import StreamedGradients
from mpitrain.parallel.gathered import GatheredParameters
from mpitrain.parallel.lanes import LaneSteps
from mpitrain.parallel.owned import OwnedParameters
from mpitrain.parallel.reproducible import ShardedLaneSteps
from mpitrain.parallel.sharded import ShardedParameters
from mpitrain.parallel.synchronous import Synchronous
from mpitrain.train.bench.tasks import Task

KINDS = ("parameters", "gradients", "optimizer", "activations")
"""Of memory."""

CODEC = "codec"
"""A further kind: what a codec of gradients remembers from step to step."""

_STATES = 2
"""Numbers that Adam keeps for each parameter."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one kind on a rank, the mean over all.

    Parameters
    ----------
    measured_bytes : float
        What the arrays hold; memory that ranks share counts once for all of them.
    predicted_bytes : float, optional
        By formula; None: there is none.
    """

    measured_bytes: float
    predicted_bytes: float | None = None


def memory(comm: Communicator, task: Task, network: Network, method: Synchronous) -> dict[str, Memory]:
    """Return the memory of a method that has taken steps, by kind.

    Parameters
    ----------
    comm : Communicator
        The ranks of the method.
    task : Task
        What it trains.
    network : Network
        The model; its pool holds activations and the workspace of the backward pass.
    method : Synchronous
        Any of ours, under Adam.

    Notes
    -----
    Collective.  Predicted activations are what the forward pass keeps; measured, the workspace comes on top.
    """
    item = network.layout.dtype.itemsize
    measured, shared = held(comm, network.pool.nbytes, method)
    foreseen = predicted(method, network.layout.size * item, comm.size, shared)
    foreseen["activations"] = cost(task.layer(), task.shape).kept * item
    return {name: Memory(each, foreseen[name]) for name, each in measured.items()}


def held(comm: Communicator, pool_nbytes: int, method: Synchronous) -> tuple[dict[str, float], bool]:
    """Return the bytes that a rank holds, by kind, the mean over all, and whether ranks share their parameters.

    What they share counts once for all of them.  Collective.

    Parameters
    ----------
    comm : Communicator
        All ranks that train together.
    pool_nbytes : int
        What the model's pool has taken: activations and the workspace of the backward pass.
    method : Synchronous
        One that has taken steps.
    """
    common, own = _parameters(method)
    sharers = _sharers(method.comm, common[0])
    params = own + held_bytes(common) / sharers
    lanes = method.lane_grads if isinstance(method, LaneSteps) else []
    whole = [] if isinstance(method, ShardedLaneSteps) else [method.grads]  # lanes are all that it has of these
    grads = held_bytes([*_arrays([vars(each) for each in (*whole, *lanes)]), *_sums(method)])
    state = held_bytes(array for part in method.parts for array in part.state.values())
    mean = comm.allreduce(np.array([params, grads, state, float(pool_nbytes)]), "mean")
    return dict(zip(KINDS, mean.tolist(), strict=True)), sharers > 1


def codec_held_bytes(method: Synchronous) -> int:
    """Return the bytes of what a codec remembers on this rank, the same on all; 0 where there is none."""
    return sum(piece.array.nbytes for piece in method.state().pieces if piece.name.startswith("codec."))


def predicted(method: Synchronous, n: float, ranks: int, shared: bool, states: int = _STATES) -> dict[str, float]:
    """Return the bytes a rank by the formulas of the methods, see `GradientParallel` and ``docs/bench.md``.

    Parameters
    ----------
    method : Synchronous
        Which formula.
    n : float
        Bytes of the parameters in the model's dtype, in a pipeline of a stage's.
    ranks : int
        How many hold the same.
    shared : bool
        Whether all of them have the parameters, or those that are gathered, in one memory.
    states : int
        Numbers that the optimizer keeps for each parameter.

    Notes
    -----
    Of a reproducible method, the gradients are those that lanes are summed into.
    """
    updated = n / ranks if isinstance(method.params, GatheredParameters | ShardedParameters) else n
    return {
        "parameters": _parameters_predicted(method, n, updated, ranks if shared else 1),
        "gradients": _gradients_predicted(method, n, updated, shared or ranks == 1),
        "optimizer": states * updated,
    }


def _parameters_predicted(method: Synchronous, n: float, updated: float, sharers: int) -> float:
    """Return the bytes of what passes read, once for all that share it, and of what is updated if that lies apart."""
    if isinstance(method.params, ShardedParameters):
        return _gathered(method.params) / sharers + updated
    if method.precision is None:
        return n / sharers
    halves = n * method.precision.dtype.itemsize / method.model.layout.dtype.itemsize
    return halves / sharers + updated


def _gradients_predicted(method: Synchronous, n: float, updated: float, within: bool) -> float:
    """Return the bytes of gradients; ``within``: sums of shards lie among them, as where ranks share these."""
    if isinstance(method, ShardedLaneSteps):
        return updated
    if isinstance(method.grads, StreamedGradients):
        return updated + _passing(method.grads)
    return n if within or not isinstance(method, OwnedParameters) else n + updated


def _passing(grads: StreamedGradients) -> int:
    """Return the bytes through which streamed gradients pass: the largest bucket, and small ones, which wait."""
    largest = max(grads.buckets, key=lambda bucket: bucket.size, default=None)
    held = [each.size for each in grads.buckets if each is largest or each.segments[0].group != "decay"]
    return sum(held) * grads.layout.dtype.itemsize


def _gathered(params: ShardedParameters) -> int:
    """Return the bytes through which parameters pass: the largest bucket of weights, and of biases."""
    largest: dict[str, int] = {}
    for bucket in params.buckets:
        group = bucket.segments[0].group
        largest[group] = max(largest.get(group, 0), bucket.size)
    return sum(largest.values()) * params.layout.dtype.itemsize


def _parameters(method: Synchronous) -> tuple[list[Array], int]:
    """Return the memory of parameters that ranks may share, and the bytes of what each has by itself besides."""
    params, own = method.params, [part.params for part in method.parts]
    if isinstance(params, ShardedParameters):
        return params.passages, held_bytes(own)
    rounded = [method.rounded.flat] if method.rounded else []
    return [params.flat], held_bytes([params.flat, *own, *rounded]) - params.flat.nbytes


def _sums(method: Synchronous) -> list[Array]:
    """Return the summed gradients of each part, which may lie among the gradients."""
    return [part.grads for part in method.parts]


def held_bytes(arrays: Iterable[Array]) -> int:
    """Return how many bytes some arrays take together; where they overlap, once."""
    total = end = 0
    for start, stop in sorted(_span(array) for array in arrays if array.size):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def _span(array: Array) -> tuple[int, int]:
    start = int(array.__array_interface__["data"][0])
    return start, start + array.nbytes


def _arrays(found: Any) -> Iterator[Array]:
    """Yield the arrays that lie in buffers, lists and mappings."""
    if isinstance(found, FlatBuffer):
        found = found.flat
    if isinstance(found, np.ndarray):
        yield found
    elif isinstance(found, dict):  # another mapping may make its arrays when they are asked for
        yield from _arrays(list(found.values()))
    elif isinstance(found, list | tuple):
        for each in found:
            yield from _arrays(each)


def _sharers(comm: Communicator, params: Array) -> int:
    """Return how many ranks have their parameters where this one has: each writes its number, and looks what is there.

    Collective.
    """
    place = params.view(np.uint16)[:1]  # a small float would round the numbers of many ranks to one
    place.flags.writeable = True  # for what is shared is not to be written to
    first = place.copy()
    comm.barrier()
    place[:] = comm.rank
    comm.barrier()
    found = comm.allgather_object(int(place[0]) if place.size else -1 - comm.rank)
    comm.barrier()
    place[:] = first
    comm.barrier()
    return found.count(found[comm.rank])
