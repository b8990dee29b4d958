"""The steps that all methods share, in their one order: reduce, check, divide, clip, update.

Each works on the parts of the flat range that a rank updates: all of it where it has a replica, else shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from mpitrain._errors import MismatchError, NonFiniteError
from mpitrain._options import declared
from mpitrain._typing import Array
from mpitrain.arrays import FlatBuffer, Shard, namespace
from mpitrain.comm import Communicator
from mpitrain.method.method import Plan
from mpitrain.method.state import Kind, Piece, Read, fill, pieces_of
from mpitrain.optim import Optimizer, State, clip_value, finite, scale, squared_norm

if TYPE_CHECKING:
    from mpitrain.method.tiles import Tiles


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

    def cut(self, start: int, stop: int) -> Part:
        """Return the part of it that lies at ``[start, stop)`` of the flat range, as views."""
        where = slice(start - self.shard.start, stop - self.shard.start)
        state = {slot: array[where] for slot, array in self.state.items()}
        return Part(self.shard.layout.shard(start, stop), self.params[where], self.grads[where], state)

    def partials(self, optimizer: Optimizer, step: int) -> Array | None:
        """Return what an optimizer needs of whole tensors, as sums over this part; see `Optimizer.partials`."""
        return optimizer.partials(self.params, self.grads, self.state, step, self.shard)

    def pieces(self, kind: Kind) -> Iterator[Piece]:
        """Yield what a checkpoint holds of it, as views: parameters and optimizer state."""
        yield from pieces_of("params", self.params, self.shard, kind)
        for slot, array in self.state.items():
            yield from pieces_of(f"optimizer.{slot}", array, self.shard, kind)

    def load_parameters(self, read: Read, reads_all: bool = False) -> None:
        """Fill the parameters with those of a checkpoint; see `fill`."""
        fill("params", self.params, self.shard, read, reads_all)

    def load_state(self, read: Read, reads_all: bool = False) -> None:
        """Fill the optimizer state with that of a checkpoint; see `fill`."""
        for slot, array in self.state.items():
            fill(f"optimizer.{slot}", array, self.shard, read, reads_all)


@dataclass(frozen=True)
class Reach:
    """How a rank gets sums over the whole model, of which it updates some parts and other ranks the rest.

    Parameters
    ----------
    groups : tuple of Communicator
        A sum over the first, then the second and so on is a sum over all parts of the model.
    elsewhere : frozenset of int
        Numbers of tensors that this rank leaves out of sums.  Another rank updates the same tensors and counts them.
    """

    groups: tuple[Communicator, ...] = ()
    elsewhere: frozenset[int] = frozenset()

    def sum(self, values: Array) -> Array:
        """Return values summed over all ranks that update parts of the model.  Collective."""
        return reduce(lambda array, group: group.allreduce(array), self.groups, values)


_ALL_HERE = Reach()


def verify_replicas(comm: Communicator, digest: str) -> None:
    """Check that all ranks hold the same parameters, of which ``digest`` is a hash.  Collective.

    Raises
    ------
    MismatchError
        Naming the ranks that differ from rank 0.
    """
    digests = comm.allgather_object(digest)
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise MismatchError(
            "initial parameters differ between ranks",
            operation="setup",
            got=f"other values than rank 0's on ranks {differing}",
            remedy="a model's initialise() may depend on its key and the tensors' names alone",
        )


def verify_settings(comm: Communicator, optimizer: Optimizer, plan: Plan) -> None:
    """Check that all ranks take steps by the same rule, as far as it can be told from outside.  Collective.

    Raises
    ------
    MismatchError
        Naming the first rank whose rule differs from rank 0's.
    """
    first, last = (float(plan.schedule(step)) for step in (1, max(plan.steps, 1)))
    said = (
        f"{_rule(optimizer)}, {plan.steps} steps, learning rate {first:g} to {last:g}, clip_norm {plan.clip_norm}, "
        f"clip_value {plan.clip_value}"
    )
    check_same(comm, said, "ranks were set up to take different steps", "setup")


def check_same(comm: Communicator, said: str, problem: str, operation: str) -> None:
    """Raise `MismatchError` on all ranks, naming the first that says something else than rank 0.  Collective."""
    told = comm.allgather_object(said)
    for rank, other in enumerate(told):
        if other != told[0]:
            raise MismatchError(
                problem, operation=operation, got=f"{other} on rank {rank}", expected=f"{told[0]} as on rank 0"
            )


def _rule(optimizer: Optimizer) -> str:
    """Return an optimizer's name and its declared options; what else it holds may be this rank's own business."""
    options = ", ".join(f"{name}={value!r}" for name, value in declared(optimizer).items())
    return f"{getattr(optimizer, 'name', type(optimizer).__name__)}({options})"


def reduce_gradients(comm: Communicator, grads: FlatBuffer, buckets: tuple[tuple[int, int], ...]) -> None:
    """Sum the gradients over all ranks, in place, bucket by bucket.  Collective."""
    for start, stop in buckets:
        bucket = grads.flat[start:stop]
        comm.allreduce(bucket, out=bucket)


def all_finite(parts: Sequence[Part]) -> bool:
    """Tell whether the gradients of all of this rank's parts are finite.  Local."""
    return all(finite(part.grads) for part in parts)


def check_finite(
    comm: Communicator,
    good: bool,
    parts: Sequence[Part],
    step: int,
    own_part_finite: Callable[[], bool],
    across: Communicator | None = None,
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
    across : Communicator, optional
        Ranks that have the same samples and other parts of the model: then the ranks that are named are those of
        ``comm``, and at fault if one of these finds them so.

    Raises
    ------
    NonFiniteError
        The same on all ranks, naming the step, the ranks at fault, and the tensors.
    """
    if good:
        return
    own: tuple[bool, list[str]] = own_part_finite(), _not_finite(parts)
    if across:
        found = across.allgather_object(own)
        own = all(well for well, _ in found), [name for _, names in found for name in names]
    findings = comm.allgather_object(own)
    ranks = [rank for rank, (well, _) in enumerate(findings) if not well]
    names = dict.fromkeys(name for _, bad in findings for name in bad)
    raise NonFiniteError(
        f"the loss or gradient of step {step} is not finite",
        got=f"ranks whose own samples gave it: {ranks or 'none'}; tensors: {', '.join(names) or 'none'}",
        remedy="look for such values in the samples, lower optimizer.lr, or set optimizer.clip_norm",
    )


def _not_finite(parts: Sequence[Part]) -> list[str]:
    """Return the names of the tensors whose gradients are not finite."""
    found = [
        (number, part.shard.layout.segments[number].name)
        for part in parts
        for number, cut in part.shard.pieces
        if not finite(part.grads[cut])
    ]
    return [name for _, name in sorted(found)]


def divide(parts: Sequence[Part], count: float) -> None:
    """Turn summed gradients into mean ones: the one division of a step."""
    for part in parts:
        namespace(part.grads).divide(part.grads, part.grads.dtype.type(count), out=part.grads)


def clip(parts: Sequence[Part], plan: Plan, reach: Reach = _ALL_HERE, tiles: Tiles | None = None) -> None:
    """Clip mean gradients in place, by value and then by global norm.

    Parameters
    ----------
    reach : Reach
        Over which ranks the squared norms of parts are summed (collective); by default these parts are everything.
    tiles : Tiles, optional
        Sums them instead, with the same bits on every layout.

    Raises
    ------
    NonFiniteError
        The norm overflows, of float64 gradients above about 1e154: they would be scaled to 0.  On all ranks that share
        the norm.
    """
    if plan.clip_value is not None:
        for part in parts:
            clip_value(part.grads, part.shard, plan.clip_value)
    if plan.clip_norm is not None:
        with np.errstate(over="ignore"):  # told below
            norm = math.sqrt(tiles.squared_norm() if tiles else _squared_norm(parts, reach))
        if not math.isfinite(norm):
            raise NonFiniteError(
                "the gradient is too large for its norm, by which it is to be clipped", got=f"a norm of {norm}",
                remedy="lower optimizer.lr, or set optimizer.clip_value, which bounds each element before",
            )  # fmt: skip
        if norm > plan.clip_norm:
            for part in parts:
                scale(part.grads, part.shard, plan.clip_norm / norm)


def _squared_norm(parts: Sequence[Part], reach: Reach) -> float:
    partial = sum(squared_norm(part.grads, part.shard, reach.elsewhere) for part in parts)
    return float(reach.sum(np.array(partial, np.float64)))


def update(
    optimizer: Optimizer,
    parts: Sequence[Part],
    plan: Plan,
    step: int,
    reach: Reach = _ALL_HERE,
    tiles: Tiles | None = None,
) -> None:
    """Run the optimizer on every part; ``reach`` or ``tiles`` sum what it needs of whole tensors, as in `clip`."""
    totals = tiles.totals(optimizer, step) if tiles else _totals(optimizer, parts, step, reach)
    lr = plan.schedule(step)
    for each in parts:
        optimizer.update(each.params, each.grads, each.state, lr, step, each.shard, totals)


def _totals(optimizer: Optimizer, parts: Sequence[Part], step: int, reach: Reach) -> Array | None:
    needed = [partial for each in parts if (partial := each.partials(optimizer, step)) is not None]
    if not needed:
        return None
    totals: Array = sum(needed[1:], start=needed[0])
    if reach.elsewhere:
        totals[sorted(reach.elsewhere)] = 0
    return reach.sum(totals)


def add_sums(total: dict[str, Array] | None, sums: Mapping[str, Array]) -> dict[str, Array]:
    """Add a batch's evaluation sums to those of the batches before it."""
    if total is None:
        return {name: np.array(value, np.float64) for name, value in sums.items()}
    return {name: total[name] + sums[name] for name in total}
