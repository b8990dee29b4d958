"""Gradients of which each rank reduces the shards that it owns: all at once, or bucket by bucket on the way.

A bucket is a stretch of the flat range, of which each rank owns a shard.  Where gradients are streamed, all buckets but
the small ones of biases pass through one and the same memory while the backward pass goes on: what is complete is
reduced, each rank keeps its shard, and the next bucket begins.  So all gradients never exist at once.

All ranks reduce the buckets in one order, from the last layer to the first, whatever order their models work in: a
bucket whose turn has not come waits in memory of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, get_args

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.arrays import Allocator, GradientBuffer, GradientTree, Group, Layout, Segment, nest
from mpitrain.comm import Communicator
from mpitrain.comm.rows import Rows, rows
from mpitrain.comm.transports.shards import bounds
from mpitrain.optim import Terms, kernel
from mpitrain.parallel.piecewise import Piecewise

READ_BY_OWNERS = 16
"""Ranks up to which each reads its shard of all others' gradients at once; wider nodes combine level by level."""


@dataclass(frozen=True)
class Bucket:
    """Tensors that are reduced together.

    Parameters
    ----------
    start, stop : int
        Where they lie in the flat range.
    segments : tuple of Segment
        The tensors.
    """

    start: int
    stop: int
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Number of elements, padding included."""
        return self.stop - self.start


def buckets_of(layout: Layout, bucket_bytes: int) -> list[Bucket]:
    """Cut a layout into buckets, in the order in which a backward pass completes them.

    A layer's tensors of one group stay together; a bucket holds layers of one group, as many as ``bucket_bytes`` allow.
    """
    runs: list[list[Segment]] = []
    for (group, _), found in groupby(layout.segments, key=lambda segment: (segment.group, _layer(segment))):
        run = list(found)
        held = runs[-1] if runs and runs[-1][0].group == group else []
        if held and (run[-1].stop - held[0].offset) * layout.dtype.itemsize <= bucket_bytes:
            held += run
        else:
            runs.append(run)
    cuts = [*(run[0].offset for run in runs), layout.size]
    buckets = [Bucket(start, stop, tuple(run)) for (start, stop), run in zip(pairwise(cuts), runs, strict=True)]
    groups = get_args(Group)
    return sorted(buckets, key=lambda bucket: (groups.index(bucket.segments[0].group), -bucket.start))


def buckets_apart(layout: Layout, apart: Collection[str] = ()) -> list[Bucket]:
    """Cut a layout into one bucket for each of some tensors, and one for each stretch of all others."""
    runs = [list(run) for _, run in groupby(layout, lambda segment: segment.name if segment.name in apart else None)]
    cuts = [*(run[0].offset for run in runs), layout.size]
    found = [Bucket(*cut, tuple(run)) for cut, run in zip(pairwise(cuts), runs, strict=True)]
    return found or [Bucket(0, 0, ())]


def _layer(segment: Segment) -> str:
    return segment.name.rpartition(".")[0] or segment.name


class WholeGradients(GradientBuffer):
    """The gradients of a model, all there until they are reduced at once.

    Parameters
    ----------
    comm, layout, allocate
        As for `StreamedGradients`.
    apart : collection of str
        Tensors that are divided each by itself, in the order of the ranks: other communicators of this size, wherever
        their ranks run, cut them alike.

    Attributes
    ----------
    buckets : list of Bucket
        What is divided evenly, each by itself.
    shards, sums
        As of `StreamedGradients`; the sums may lie in the gradients' memory.
    """

    def __init__(self, comm: Communicator, layout: Layout, allocate: Allocator, apart: Collection[str] = ()) -> None:
        super().__init__(layout, allocate)
        self.buckets = buckets_apart(layout, apart)
        self._plans = [
            comm.reduce_scatter_plan(
                self.flat[bucket.start : bucket.stop],
                in_rank_order=any(segment.name in apart for segment in bucket.segments),
            )
            for bucket in self.buckets
        ]
        self.shards = [
            layout.shard(bucket.start + plan.begin, bucket.start + plan.end)
            for bucket, plan in zip(self.buckets, self._plans, strict=True)
        ]
        self.sums = [plan.shard for plan in self._plans]

    def reduce(self) -> None:
        """Sum over all ranks what was added up in a step.  Collective: one reduce_scatter a bucket."""
        for plan in self._plans:
            plan()


class _Planned:
    """Reduces what passes through a place by a plan."""

    def __init__(self, comm: Communicator, place: Array) -> None:
        self._plan = comm.reduce_scatter_plan(place)
        self.begin, self.end = self._plan.begin, self._plan.end

    def add(self, sums: Array) -> None:
        """Add the sums over all ranks of this rank's shard.  Collective."""
        sums += self._plan()


class _Read:
    """Reads what passes through the places of all ranks of a node, where it lies: see `mpitrain.optim.kernel`."""

    def __init__(self, comm: Communicator, common: Rows, place: Array) -> None:
        cuts = bounds(place.size, comm.size, place.itemsize)
        self.begin, self.end = cuts[comm.rank], cuts[comm.rank + 1]
        self._terms = Terms(tuple(row[self.begin : self.end] for row in common.arrays), own=comm.rank)
        self._run = common.reading(place.size, self._read)

    def add(self, sums: Array) -> None:
        """Add as `_Planned` does."""
        self._sums = sums
        self._run()

    def _read(self) -> None:
        kernel.add(self._sums, self._terms)


class StreamedGradients(Piecewise):
    """The gradients of a model that keeps only this rank's shards of them; see `mpitrain.arrays.Gradients`.

    Parameters
    ----------
    comm : Communicator
        The ranks that sum their gradients.
    layout : Layout
        Of the model.
    bucket_bytes : int
        About the size of a bucket.
    allocate : Allocator, optional
        Where the memory that buckets pass through comes from; None: where the ranks of a node share it.  Collective.
    own : Allocator
        Where memory of this rank's comes from.

    Attributes
    ----------
    buckets : list of Bucket
        In the order in which they are reduced.
    shards : list of Shard
        This rank's, one of each bucket.
    sums : list of array
        The sums over all ranks of the gradients of each shard.

    Notes
    -----
    Collective over ``comm``, as are `complete` and `end_pass`: one reduce_scatter of each bucket a pass.
    """

    def __init__(
        self, comm: Communicator, layout: Layout, bucket_bytes: int, allocate: Allocator | None, own: Allocator
    ) -> None:
        self.layout, self._own = layout, own
        self.buckets = buckets_of(layout, bucket_bytes)
        largest = max((each.size for each in self.buckets), default=0)
        common = None if allocate or comm.size > READ_BY_OWNERS else rows(comm, largest, layout.dtype)
        passage = common.arrays[comm.rank] if common else (allocate or comm.empty)(largest, layout.dtype)
        self._places = [passage[: bucket.size] for bucket in self.buckets]
        self._plans = [_Read(comm, common, each) if common else _Planned(comm, each) for each in self._places]
        self.shards = [
            layout.shard(bucket.start + plan.begin, bucket.start + plan.end)
            for bucket, plan in zip(self.buckets, self._plans, strict=True)
        ]
        self.sums = [own(shard.size, layout.dtype) for shard in self.shards]
        self._home = {each.name: number for number, bucket in enumerate(self.buckets) for each in bucket.segments}
        self._home |= {alias: self._home[name] for alias, name in layout.ties.items()}
        self._tree = GradientTree(nest({name: name for name in self._home}), self._ready, self._unwritten)
        self._prefixes: dict[str, list[str]] = {}
        self._waiting: dict[int, Array] = {}
        self._begun: dict[int, Array] = {}
        self._unset: set[str] = set()  # nothing was added to in this pass
        self._begin_pass()

    @property
    def tree(self) -> Mapping[str, Any]:
        """The tensors, nested along the dots of their names; each is there from when it is asked for to `complete`."""
        return self._tree

    def zero(self) -> None:
        """Begin a step: the sums are zero."""
        for each in self.sums:
            each[...] = 0
        self._begin_pass()

    def reduce(self) -> None:
        """Sum over all ranks what was added up in a step: done on the way."""

    def complete(self, prefix: str) -> None:
        """Reduce what is complete now, if it is its turn; see `FlatBuffer.complete`."""
        for name in self._under(prefix):
            if name in self._to_come:
                self._to_come.remove(name)
                self._missing[self._home[name]] -= 1
        while self._reduced < len(self.buckets) and not self._missing[self._reduced]:
            self._reduce_next()

    def end_pass(self) -> None:
        """Reduce what is left, used or not."""
        while self._reduced < len(self.buckets):
            self._reduce_next()
        self._begin_pass()

    def _begin_pass(self) -> None:
        self._reduced = 0
        self._begun.clear()
        self._unset.update(segment.name for segment in self.layout.segments)
        self._to_come = set(self._home)
        self._missing = Counter(self._home.values())

    def _under(self, prefix: str) -> list[str]:
        if prefix not in self._prefixes:
            names = (name for name in self._home if name.startswith(prefix))
            self._prefixes[prefix] = [prefix] if prefix in self._home else list(names)
        return self._prefixes[prefix]

    def _ready(self, name: str) -> Array:
        """Return the memory of a tensor for this pass, zero at first."""
        view = self._unwritten(name)
        if view is not None:
            view[...] = 0
            return view
        return self._view(name)

    def _unwritten(self, name: str) -> Array | None:
        view, name = self._view(name), self.layout.ties.get(name, name)
        if name not in self._unset:
            return None
        self._unset.remove(name)
        return view

    def _view(self, name: str) -> Array:
        number = self._home[name]
        if number < self._reduced:
            raise InputError(
                f"the gradient of {name!r} was asked for after it was complete", operation="GradientParallel, stage 2",
                remedy="a model calls grads.complete(prefix) once nothing below the prefix is written any more",
            )  # fmt: skip
        bucket, segment = self.buckets[number], self.layout[name]
        if number not in self._begun:
            self._begun[number] = self._memory(number)
        found: Array = self._begun[number][segment.offset - bucket.start : segment.stop - bucket.start]
        return found.reshape(segment.shape)

    def _memory(self, number: int) -> Array:
        """Return where a bucket is gathered: the passage if it is next, else memory that is kept for it."""
        if number == self._reduced:
            return self._places[number]
        if number not in self._waiting:
            self._waiting[number] = self._own(self.buckets[number].size, self.layout.dtype)
        return self._waiting[number]

    def _reduce_next(self) -> None:
        number = self._reduced
        place, begun = self._places[number], self._begun.pop(number, None)
        if begun is not None and begun is not place:
            place[...] = begun
        self._clear(self.buckets[number], place)
        self._plans[number].add(self.sums[number])
        self._reduced += 1

    def _clear(self, bucket: Bucket, place: Array) -> None:
        """Zero what no layer has written: tensors that are not used, and the padding between."""
        ends = [*(segment.offset for segment in bucket.segments[1:]), bucket.stop]
        for segment, end in zip(bucket.segments, ends, strict=True):
            start = segment.offset if segment.name in self._unset else segment.stop
            place[start - bucket.start : end - bucket.start] = 0

    def _refusal(self) -> InputError:
        return InputError(
            "this model asks for all gradients at once, which stage 2 never has", operation="GradientParallel",
            got="grads.flat or grads.views", expected="grads.tree", remedy="use stage 1",
        )  # fmt: skip
