"""Pipeline-parallel SGD: the model is cut into stages, one rank or more apart, and microbatches flow through them.

What is computed, and in which order a rank does so, is the schedule's; the method says what belongs to whom.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain._names import did_you_mean
from mpitrain._options import NON_NEGATIVE, check, check_kind
from mpitrain._typing import Array, DType
from mpitrain.arrays import Allocator, Batch, FlatBuffer, GradientBuffer, Gradients, Layout
from mpitrain.arrays.flatbuffer import sha256
from mpitrain.comm import Communicator, ProcessMesh
from mpitrain.comm.local import alone
from mpitrain.method.evaluation import filled, something
from mpitrain.method.method import Plan
from mpitrain.method.precision import Precision
from mpitrain.method.state import Kind, State
from mpitrain.method.steps import Part, Reach, add_sums, reduce_gradients
from mpitrain.nn import Network, Sequential
from mpitrain.nn.cutting import part, units
from mpitrain.nn.model import Model, Reduce
from mpitrain.optim import Optimizer
from mpitrain.parallel.across import reach, whole_tensor
from mpitrain.parallel.checks import check_parts, checked
from mpitrain.parallel.pipeline.cuts import edges, partition
from mpitrain.parallel.pipeline.evaluator import Evaluator
from mpitrain.parallel.pipeline.executor import Executor
from mpitrain.parallel.pipeline.links import Links
from mpitrain.parallel.pipeline.schedule import Sizes
from mpitrain.parallel.pipeline.schedules import FAMILIES
from mpitrain.parallel.pipeline.stages import Microbatch, Stages
from mpitrain.parallel.pipeline.ties import Ties
from mpitrain.parallel.pipeline.validator import validate
from mpitrain.parallel.synchronous import DEFAULT_BUCKET_BYTES, Synchronous
from mpitrain.parallel.tally import Tally


class PipelineParallel(Synchronous):
    """Synchronous SGD with the layers of the model divided among the ranks.

    Parameters
    ----------
    where : Communicator or ProcessMesh
        A communicator: its ranks make up the pipeline.  A mesh with the axes ``pipe``, ``data`` and ``tensor``, or some
        of them: each pipeline takes a share of each batch, and gradients of a stage are summed over ``data``; ranks
        along ``tensor`` divide each stage's tensors, as the model they are handed says.
    schedule : str
        Name in `FAMILIES`.
    chunks : int
        Stages of each rank.
    microbatches : int
        Into how many parts a batch is cut, each of which passes through all stages.  BatchNorm normalises each by
        itself, as in all methods.
    costs : sequence of float, optional
        Of each unit (`mpitrain.nn.cutting.units`), by which the stages are balanced; rank 0's count.  None: the number
        of its parameters.
    cuts : sequence of int, optional
        In place of ``costs``: the number of the first unit of each stage but the first; rank 0's count.
    bucket_bytes : int
        Largest piece in which gradients are reduced over ``data``.
    allocator : Allocator, optional
        Where parameters, gradients and optimizer state live; None: in ordinary memory.
    precision : Precision, optional
        In which 16-bit type the stages compute, see there, and in which activations and their gradients are sent.

    Notes
    -----
    Collective, as are all methods; the ranks of a pipeline see the same batches when they train.  Cost of a step, for v
    chunks, m microbatches on p ranks: 2 (pv − 1) m messages over all ranks; the gradients of tensors that are tied
    across stages; and an allreduce of five numbers.  The overhead is that of the schedule.  A rank keeps parameters,
    gradients and optimizer state of its stages alone, and the activations of as many microbatches as the schedule says.

    Attributes
    ----------
    cuts : tuple of int
        Where the model is cut, once it is set up: as the parameter of this name.
    """

    kind: Kind = "sharded"

    params: FlatBuffer
    grads: GradientBuffer
    cuts: tuple[int, ...]
    _ties: Ties

    def __init__(
        self,
        where: Communicator | ProcessMesh,
        *,
        schedule: str = "1f1b",
        chunks: int = 1,
        microbatches: int = 1,
        costs: Sequence[float] | None = None,
        cuts: Sequence[int] | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        allocator: Allocator | None = None,
        precision: Precision | None = None,
    ) -> None:
        comm, self.pipe, data, across = axes(where)
        self.data = data or alone()
        super().__init__(comm, microbatches, bucket_bytes, allocator, across, precision)
        if schedule not in FAMILIES:
            raise InputError(
                "no such schedule", operation="PipelineParallel", got=repr(schedule), expected=", ".join(FAMILIES),
                remedy=did_you_mean(schedule, FAMILIES),
            )  # fmt: skip
        self.sizes = Sizes(self.pipe.size, chunks, microbatches)
        self.schedule = FAMILIES[schedule].schedule(self.sizes)
        validate(self.schedule)
        self.costs: Sequence[float] | None
        self._given: Sequence[int] | None
        self.costs, self._given = comm.broadcast_object((costs, cuts))
        if self.costs is not None and self._given is not None:
            got = f"{len(self.costs)} costs, {len(self._given)} cuts"
            raise InputError("stages are balanced by costs or cut by cuts", operation="PipelineParallel", got=got)

    @property
    def _owners(self) -> Communicator:
        return self.data

    def setup(self, model: Model, optimizer: Optimizer, plan: Plan) -> None:
        """See `Method.setup`.

        Raises
        ------
        InputError
            The model is not a `Network` of a `Sequential`, or has fewer units than there are stages.
        """
        check_parts(model, optimizer, plan)
        if not isinstance(model, Network) or not isinstance(model.layer, Sequential):
            got = type(model.layer).__name__ if isinstance(model, Network) else type(model).__name__
            raise InputError(
                "the model cannot be cut into stages", operation="PipelineParallel", got=got,
                expected="a Network of a Sequential", remedy="put its layers into a Sequential, or take another method",
            )  # fmt: skip
        self._network, self._layers = model, model.layer
        super().setup(model, optimizer, plan)
        executor = self._make_executor(model.layout.dtype)
        self.executor = self._make_executor(self.precision.dtype) if self.precision else executor
        self._evaluator = Evaluator(self.pipe, executor, model, plan.key)

    def _held(self, layout: Layout) -> Layout:
        """Cut the model into stages; return the layout of this rank's."""
        found = self._edges()
        self.cuts = found[1:-1]
        layers = [part(self._layers, *cut) for cut in pairwise(found)]
        names = [frozenset(each.name for each in layer.parameters()) for layer in layers]
        used = [frozenset().union(*(names[s] for s in self.sizes.stages_of(rank))) for rank in range(self.sizes.ranks)]
        if "_ties" in vars(self):
            self._ties.free()
        self._ties = Ties(self.pipe, used, layout.ties)
        self._own = {stage: layers[stage] for stage in self.sizes.stages_of(self.pipe.rank)}
        return layout.select(used[self.pipe.rank])

    def _allocate(self, layout: Layout) -> None:
        self.params, self.grads = FlatBuffer(layout, self._allocator), GradientBuffer(layout, self._allocator)
        if self.precision:
            self.rounded = FlatBuffer(layout.astype(self.precision.dtype), self._allocator)
        state = self.optimizer.init(layout.whole(), self._allocator)
        self.parts = (Part(layout.whole(), self.params.flat, self.grads.flat, state),)

    def _make_executor(self, dtype: DType) -> Executor:
        """Return what runs this rank's stages, and sends in ``dtype``."""
        links = Links(self.pipe, self.sizes, self._network.pool, self.params.xp, dtype)
        return Executor(self.pipe, self.sizes, Stages(self._network, self._own), links)

    def _edges(self) -> tuple[int, ...]:
        """Return which units each stage begins and ends with."""
        row = units(self._layers)
        if self._given is not None:
            return edges(self._given, len(row), self.sizes.stages)
        costs = self.costs
        if costs is None:
            costs = [1 + sum(np.prod(each.shape, dtype=int) for each in layer.parameters()) for _, layer in row]
        if len(costs) != len(row):
            what = "there is not one cost a layer"
            raise InputError(what, operation="PipelineParallel", got=len(costs), expected=len(row))
        for cost in costs:
            check("PipelineParallel", "one of costs", cost, NON_NEGATIVE)
        return partition(costs, self.sizes.stages)

    def _initialise(self) -> None:
        self._draw(self.params)
        self._agreement.check_parameters(self.data, [self.params])

    def _draw(self, params: FlatBuffer) -> None:
        super()._draw(params)
        self._ties.publish(params)

    @property
    def shares(self) -> tuple[tuple[int, int], ...]:
        """The share of this rank's pipeline, see `Synchronous.shares`."""
        return ((self.data.rank, self.data.size),)

    @property
    def evaluation_shares(self) -> tuple[tuple[int, int], ...]:
        """A share for each rank, see `Synchronous.evaluation_shares`."""
        return ((self.comm.rank, self.comm.size),)

    def _gradients(self, microbatches: list[Batch], grads: Gradients, reduce: Reduce | None) -> Tally:
        """Pass the microbatches through the pipeline; its last rank tells of loss and count.  Collective over it."""
        (tally,) = self._flow(microbatches, [grads], reduce)
        return tally

    def _flow(self, microbatches: list[Batch], sums: Sequence[Gradients], reduce: Reduce | None) -> list[Tally]:
        """Pass microbatches through the pipeline, an equal number in turn for each of ``sums``."""
        each = len(microbatches) // len(sums)
        keys = self._passes.begin(self.step, each) * len(sums)
        params = self._to_read()
        assert isinstance(params, FlatBuffer)  # as of all pipelines
        for grads in sums:
            grads.zero()
        with self._passes.overflowing():
            ready = [
                Microbatch.of(self._network, batch, params, self._passes.scale, training=True, key=key, reduce=reduce)
                for batch, key in zip(microbatches, keys, strict=True)
            ]
            losses = self.executor.train(self.schedule, ready, [sums[number // each] for number in range(len(ready))])
        for grads in sums:
            grads.end_pass()
        parts = [slice(first, first + each) for first in range(0, len(ready), each)]
        return [self._tally(ready[part], losses[part]) for part in parts]

    def _tally(self, ready: Sequence[Microbatch], losses: Sequence[float]) -> Tally:
        loss_sum = sum(losses)
        tally = Tally(stops=float(self._stop), bad=float(not np.isfinite(loss_sum)))
        if self.pipe.rank == self._last_rank:
            count = sum(self._network.loss.count(each.batch) for each in ready)
            samples = float(sum(len(each.batch) for each in ready))
            tally = replace(tally, loss=loss_sum, count=count, samples=samples)
        return tally

    def _reduce_gradients(self) -> None:
        """Sum all gradients over the pipelines, and then those of tied tensors over the stages.

        In this order: a sum over pipelines may be rounded by where a tensor lies, one over stages is the same on both.
        """
        if self.data.size > 1:
            reduce_gradients(self.data, self.grads.buffer, self.params.layout.buckets(self.bucket_bytes))
        self._ties.sum(self.grads.views)

    def _reduce(self, array: Array) -> Array:
        return super()._reduce(array) if self.data.size > 1 else array

    def _over_model(self) -> Reach:
        once = self._ties.copies  # for a tied tensor counts once
        return reach(self.across, self.params.layout, self.pipe, elsewhere=once)

    @property
    def _last_rank(self) -> int:
        """The rank of the pipeline that has the last stage."""
        return self.sizes.ranks - 1

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """See `Method.evaluate`: each rank hands in its own batches, all of which pass through the pipeline."""
        own: dict[str, Array] | None = None
        params = self.whole()
        for round_ in self._evaluator.rounds(checked(batches)):
            for found in self._evaluator.sums(round_, params):
                own = add_sums(own, found)
        sums: dict[str, Array] | None = self.pipe.broadcast_object(own, self._last_rank)
        return self._metrics(self.data.allreduce(something(filled(self.data, sums))))

    def predict(self, inputs: Array) -> Array:
        """See `Method.predict`: the first rank's inputs, which all ranks hand in alike."""
        return self._network.united(self._evaluator.outputs(inputs, self.whole()))

    def state(self) -> State:
        """See `Method.state`: a tied tensor is its first holder's, and of equal pipelines the first one speaks."""
        found = super().state()
        elsewhere = self._saved_elsewhere
        return State(tuple(p for p in found.pieces if p.name.partition("/")[2] not in elsewhere), found.scalars)

    @property
    def _saved_elsewhere(self) -> Collection[str]:
        """The tensors of which another rank gives what this one has too."""
        return self._ties.copies if self.data.rank == 0 else self._ties.owners

    def weights_sha256(self) -> str:
        """See `Method.weights_sha256`: tensor by tensor through the first rank."""
        layout, digest, params = self.model.layout, "", self.whole()
        names = sorted(segment.name for segment in layout)
        if self.pipe.rank == 0:
            digest = sha256(whole_tensor(self.across, layout[name], self._fetched(name, params)) for name in names)
        else:
            for name in names:
                if self._owner(name) == self.pipe.rank:
                    self.pipe.send(params.views[name], 0)
        found: str = self.pipe.broadcast_object(digest)
        return found

    def _fetched(self, name: str, params: FlatBuffer) -> Array:
        """Return the values of a tensor, on the pipeline's first rank."""
        owner = self._owner(name)
        if owner == 0:
            return params.views[name]
        shape = self.model.layout[name].shape
        received: Array = self.pipe.recv(params.xp.empty(shape, params.layout.dtype), owner)
        return received

    def _owner(self, name: str) -> int:
        return self._ties.owners[name]


Axes = tuple[Communicator, Communicator, Communicator | None, Communicator | None]


def axes(where: Communicator | ProcessMesh) -> Axes:
    """Return the communicators of all pipelines, along one, over equal ones, and across a stage; None: of one rank."""
    if isinstance(where, Communicator):
        return where, where, None, None
    check_kind("PipelineParallel", "where", where, ProcessMesh, "a Communicator or a ProcessMesh")
    mesh = where
    if not {"pipe"} <= set(mesh) <= {"data", "pipe", "tensor"}:
        got, expected = ", ".join(mesh), "pipe, and data or tensor"
        raise InputError("the mesh does not fit", operation="PipelineParallel", got=got, expected=expected)
    data, tensor = (mesh[name] if mesh.shape.get(name, 1) > 1 else None for name in ("data", "tensor"))
    return mesh[tuple(name for name in mesh if name != "tensor")] if tensor else mesh.comm, mesh["pipe"], data, tensor
