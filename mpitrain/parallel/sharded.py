"""Parameters of which each rank keeps its shards, and which are gathered for the layer that is about to use them.

A bucket is gathered into a passage, a stretch of memory that it shares with other buckets: it is there until another
one needs the place.  What a layer uses together lies in different passages.  So all parameters never exist at once.

All ranks must ask for the layers in one order, for each gathering is a collective operation; that they do is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mpitrain._errors import InputError
from mpitrain._typing import Array, DType
from mpitrain.arrays import Allocator, FlatBuffer, Layout, Loans, ParameterTree, Shard, namespace, nest
from mpitrain.comm import Communicator
from mpitrain.comm.shard_plans import AllgatherPlan
from mpitrain.nn.model import Model
from mpitrain.parallel.buckets import Bucket
from mpitrain.parallel.piecewise import Piecewise
from mpitrain.parallel.walk import Walk


class ShardedParameters(Piecewise):
    """The parameters of a model that keeps only this rank's shards of them; see `mpitrain.arrays.ParameterSource`.

    Parameters
    ----------
    comm : Communicator
        The ranks that divide the parameters.
    model : Model
        One that `reads_by_layer`.
    buckets : sequence of Bucket
        What is gathered together.
    shards : sequence of Shard
        This rank's, one of each bucket.
    common : Allocator, optional
        Where passages come from, collectively; None: where the ranks of a node share them, as far as they can.
    own : Allocator
        Where the shards' memory comes from.
    dtype : dtype, optional
        What parameters are gathered in; None: in the layout's dtype, which the shards have.

    Attributes
    ----------
    owned : list of array
        The values of each shard.  Whoever writes to them calls `release` before anything is read.
    passages : list of array
        The memory that buckets are gathered in.

    Notes
    -----
    Collective over ``comm``: everything but `release`.  Cost of a layer that is used: nothing if its buckets are there,
    else an allgather of each that is not, and on a node with a common passage a barrier, for others may still read what
    lay there.

    A layer that keeps a view of its parameters after its call would read other layers' values there.  Before memory is
    used again it is checked that nobody holds one (`Loans`): an InputError on the rank that does.  So is the order in
    which layers are used (`Walk`).
    """

    def __init__(
        self,
        comm: Communicator,
        model: Model,
        buckets: Sequence[Bucket],
        shards: Sequence[Shard],
        common: Allocator | None,
        own: Allocator,
        dtype: DType | None = None,
    ) -> None:
        layout = model.layout
        self.layout, self._layer_of = layout.astype(dtype or layout.dtype), model.layer_of
        self.buckets, self._shards = buckets, shards
        self.owned = [own(shard.size, layout.dtype) for shard in shards]
        self.xp = namespace(own(0, layout.dtype))
        self._allocate = common or comm.shared
        self._fence = None if common or comm.transport != "shared" else comm.node.barrier
        self._needs = _needs(layout, buckets, model.layer_of)
        self._passage_of = _colours(len(buckets), self._needs.values())
        self._places = self._lay_out()
        self._plans = [self._plan(comm, number) for number in range(len(buckets))]
        tensors = self._tensors()
        self._loans = Loans(tensors, self.xp)
        self._tree = ParameterTree(nest({name: name for name in (*tensors, *layout.ties)}), self._bring)
        self._there: dict[int, int] = {}  # by passage, the bucket in it
        self._layer: str | None = None  # whose buckets are known to be there
        self._walk = Walk(comm)

    def _lay_out(self) -> list[Array]:
        """Allocate the passages; return each bucket's place in its own."""
        sizes: dict[int, int] = {}
        for bucket, passage in zip(self.buckets, self._passage_of, strict=True):
            sizes[passage] = max(sizes.get(passage, 0), bucket.size)
        self.passages = [self._allocate(size, self.layout.dtype) for _, size in sorted(sizes.items())]
        return [self.passages[each][: bucket.size] for bucket, each in zip(self.buckets, self._passage_of, strict=True)]

    def _own_place(self, number: int) -> slice:
        bucket, shard = self.buckets[number], self._shards[number]
        return slice(shard.start - bucket.start, shard.stop - bucket.start)

    def _plan(self, comm: Communicator, number: int) -> AllgatherPlan:
        own = self._own_place(number)
        return comm.allgather_plan(self._places[number], own.start, own.stop)

    def _tensors(self) -> dict[str, Array]:
        """Return where each tensor is while its bucket is there."""
        return {
            segment.name: place[segment.offset - bucket.start : segment.stop - bucket.start].reshape(segment.shape)
            for bucket, place in zip(self.buckets, self._places, strict=True)
            for segment in bucket.segments
        }

    @property
    def tree(self) -> Mapping[str, Any]:
        """The tensors, nested along the dots of their names; each is there until another layer's is asked for."""
        return self._tree

    @property
    def nbytes(self) -> int:
        """Bytes that this rank keeps by itself: those of its shards."""
        return sum(array.nbytes for array in self.owned)

    @property
    def passage_nbytes(self) -> int:
        """Bytes of the passages, which are there once a node where its ranks share memory."""
        return sum(passage.nbytes for passage in self.passages)

    def end_passes(self) -> None:
        """Be told that all passes of a step are done; see `Walk.end`."""
        self._layer = None
        self._walk.end()

    def release(self) -> None:
        """Forget what is there: it is gathered again when it is used next."""
        for number in self._there.values():
            self._check_returned(number)
        self._there.clear()
        self._layer = None

    def whole(self) -> FlatBuffer:
        """Return a copy of all parameters, in memory like the passages'.  Collective: each bucket is gathered."""
        found = FlatBuffer(self.layout, self._allocate)
        for number, bucket in enumerate(self.buckets):
            self._hold(number)
            found.flat[bucket.start : bucket.stop] = self._places[number]  # by every rank, and by all the same
        self._layer = None
        return found

    def _bring(self, name: str) -> Array:
        layer = self._layer_of(name)
        if layer != self._layer:
            self._walk.visit(layer)
            for number in self._needs[layer]:
                self._hold(number)
            self._layer = layer
        return self._loans.lend(self.layout.ties.get(name, name))

    def _hold(self, number: int) -> None:
        passage = self._passage_of[number]
        there = self._there.get(passage)
        if there == number:
            return
        if there is not None:
            self._check_returned(there)
        if self._fence is not None:
            self._fence()
        self._places[number][self._own_place(number)] = self.owned[number]
        self._plans[number]()
        self._there[passage] = number

    def _check_returned(self, number: int) -> None:
        """Refuse to reuse the memory of a bucket of which somebody still holds a view: it would read other values."""
        held = self._loans.held([segment.name for segment in self.buckets[number].segments])
        if held:
            raise InputError(
                "a layer keeps parameters after its call, whose memory other layers are about to use",
                operation="GradientParallel, stage 3",
                got=f"a view of {', '.join(map(repr, held[:3]))} that is still held",
                expected="parameters that are asked for in each call, and none kept in the layer or its context",
                remedy="drop it, keep a copy, or use stage 2",
            )  # fmt: skip

    def _refusal(self) -> InputError:
        return InputError(
            "stage 3 never has all parameters at once", operation="GradientParallel",
            got="params.flat or params.views", expected="params.tree, or the method's whole()",
        )  # fmt: skip


def _needs(layout: Layout, buckets: Sequence[Bucket], layer_of: Callable[[str], str]) -> dict[str, list[int]]:
    """Return which buckets each layer needs, in ascending order."""
    home = {segment.name: number for number, bucket in enumerate(buckets) for segment in bucket.segments}
    home |= {alias: home[name] for alias, name in layout.ties.items()}
    found: dict[str, set[int]] = {}
    for name, number in home.items():
        found.setdefault(layer_of(name), set()).add(number)
    return {layer: sorted(numbers) for layer, numbers in found.items()}


def _colours(count: int, together: Iterable[Sequence[int]]) -> list[int]:
    """Return a passage for each bucket; those that are needed together get different ones."""
    apart: list[set[int]] = [set() for _ in range(count)]
    for numbers in together:
        for number in numbers:
            apart[number].update(numbers)
    colours: list[int] = []
    for number in range(count):
        taken = {colours[other] for other in apart[number] if other < number}
        colours.append(next(colour for colour in range(count) if colour not in taken))
    return colours
