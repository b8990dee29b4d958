"""Parameters of which each rank keeps its shards, and which are gathered for the layer that is about to use them.

A bucket is gathered into a passage, a stretch of memory that it shares with other buckets: it is there until another
one needs the place.  What a layer uses together lies in different passages.  So all parameters never exist at once.

All ranks must ask for the layers in one order, for each gathering is a collective operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from mpitrain._errors import InputError
from mpitrain._typing import Array, DType
from mpitrain.arrays import Allocator, FlatBuffer, Layout, ParameterTree, Shard, namespace, nest
from mpitrain.comm import Communicator
from mpitrain.comm.shard_plans import AllgatherPlan
from mpitrain.parallel.buckets import Bucket


class ShardedParameters:
    """The parameters of a model that keeps only this rank's shards of them; see `mpitrain.arrays.ParameterSource`.

    Parameters
    ----------
    comm : Communicator
        The ranks that divide the parameters.
    layout : Layout
        Of the model.
    buckets : sequence of Bucket
        What is gathered together; all tensors of a layer that are in one group are in one bucket.
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

    Notes
    -----
    Collective over ``comm``: everything but `release`.  Cost of a layer that is used: nothing if its buckets are there,
    else an allgather of each that is not, and on a node with a common passage a barrier, for others may still read what
    lay there.
    """

    def __init__(
        self,
        comm: Communicator,
        layout: Layout,
        buckets: Sequence[Bucket],
        shards: Sequence[Shard],
        common: Allocator | None,
        own: Allocator,
        dtype: DType | None = None,
    ) -> None:
        self.layout, self.buckets, self._shards = layout.astype(dtype or layout.dtype), buckets, shards
        self.owned = [own(shard.size, layout.dtype) for shard in shards]
        self.xp = namespace(own(0, layout.dtype))
        self._allocate = common or comm.shared
        self._fence = None if common or comm.transport != "shared" else comm.node.barrier
        self._needs = _needs(layout, buckets)
        self._passage_of = _colours(len(buckets), self._needs.values())
        self._places = self._lay_out()
        self._plans = [self._plan(comm, number) for number in range(len(buckets))]
        self._views = self._named()
        self._tree = ParameterTree(nest({name: name for name in self._views}), self._bring)
        self._there: dict[int, int] = {}  # by passage, the bucket in it
        self._layer: str | None = None  # whose buckets are known to be there

    def _lay_out(self) -> list[Array]:
        sizes: dict[int, int] = {}
        for bucket, passage in zip(self.buckets, self._passage_of, strict=True):
            sizes[passage] = max(sizes.get(passage, 0), bucket.size)
        passages = {each: self._allocate(size, self.layout.dtype) for each, size in sorted(sizes.items())}
        return [passages[each][: bucket.size] for bucket, each in zip(self.buckets, self._passage_of, strict=True)]

    def _own_place(self, number: int) -> slice:
        bucket, shard = self.buckets[number], self._shards[number]
        return slice(shard.start - bucket.start, shard.stop - bucket.start)

    def _plan(self, comm: Communicator, number: int) -> AllgatherPlan:
        own = self._own_place(number)
        return comm.allgather_plan(self._places[number], own.start, own.stop)

    def _named(self) -> dict[str, Array]:
        """Return where each tensor is while its bucket is there, by each of its names."""
        found = {
            segment.name: place[segment.offset - bucket.start : segment.stop - bucket.start].reshape(segment.shape)
            for bucket, place in zip(self.buckets, self._places, strict=True)
            for segment in bucket.segments
        }
        return found | {alias: found[name] for alias, name in self.layout.ties.items()}

    @property
    def flat(self) -> Array:
        """Never there all at once."""
        self._refuse()

    @property
    def views(self) -> Mapping[str, Array]:
        """Never there all at once."""
        self._refuse()

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
        largest: dict[int, int] = {}
        for place, passage in zip(self._places, self._passage_of, strict=True):
            largest[passage] = max(largest.get(passage, 0), place.nbytes)
        return sum(largest.values())

    def release(self) -> None:
        """Forget what is there: it is gathered again when it is used next."""
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
        layer = _layer(name)
        if layer != self._layer:
            for number in self._needs[layer]:
                self._hold(number)
            self._layer = layer
        return self._views[name]

    def _hold(self, number: int) -> None:
        passage = self._passage_of[number]
        if self._there.get(passage) == number:
            return
        if self._fence is not None:
            self._fence()
        self._places[number][self._own_place(number)] = self.owned[number]
        self._plans[number]()
        self._there[passage] = number

    def _refuse(self) -> NoReturn:
        raise InputError(
            "stage 3 never has all parameters at once", operation="GradientParallel",
            got="params.flat or params.views", expected="params.tree, or the method's whole()",
        )  # fmt: skip


def _needs(layout: Layout, buckets: Sequence[Bucket]) -> dict[str, list[int]]:
    """Return which buckets each layer needs, in ascending order."""
    home = {segment.name: number for number, bucket in enumerate(buckets) for segment in bucket.segments}
    home |= {alias: home[name] for alias, name in layout.ties.items()}
    found: dict[str, set[int]] = {}
    for name, number in home.items():
        found.setdefault(_layer(name), set()).add(number)
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


def _layer(name: str) -> str:
    return name.rpartition(".")[0]
