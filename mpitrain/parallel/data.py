"""Data-parallel SGD: every rank holds the whole model and computes the gradient of its share of each batch.

The gradients are summed over the ranks and divided once by the global number of samples, so that the step is the one
a single rank would take on the whole batch, however unevenly it is shared.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.arrays import Allocator, Batch, FlatBuffer, plain
from mpitrain.comm import Communicator
from mpitrain.method.method import Feed, Method, Plan, Progress
from mpitrain.method.state import State, fill, pieces_of
from mpitrain.method.steps import (
    add_sums,
    check_finite,
    clip,
    divide,
    reduce_gradients,
    update,
    verify_replicas,
)
from mpitrain.nn.model import Model, Reduce
from mpitrain.optim import Optimizer

DEFAULT_BUCKET_BYTES = 4 << 20


class DataParallel(Method):
    """Synchronous data-parallel SGD.

    Parameters
    ----------
    comm : Communicator
        The ranks that share each batch.
    microbatches : int
        Into how many parts a batch is cut; their gradients are accumulated (less memory, the same step but for
        BatchNorm, which normalises each microbatch on its own).
    bucket_bytes : int
        Largest piece in which gradients are reduced.
    average_every : int
        0: reduce the gradients at each step.  k > 0: each rank trains on its own share, and every k steps parameters
        and optimizer state are averaged, weighted by the samples that each rank has seen (local SGD with averaged
        momentum; Yu, Jin, Yang, ICML 2019).  Commit points are then those steps.
    allocator : Allocator
        Where parameters, gradients and optimizer state live.

    Notes
    -----
    Cost of a step beyond the gradient: an allreduce of the gradients, 2(p−1)/p · n bytes moved per rank where the
    library uses a ring, and one of four numbers.
    """

    def __init__(
        self,
        comm: Communicator,
        *,
        microbatches: int = 1,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        average_every: int = 0,
        allocator: Allocator = plain,
    ) -> None:
        for name, value, least in (
            ("microbatches", microbatches, 1),
            ("bucket_bytes", bucket_bytes, 1),
            ("average_every", average_every, 0),
        ):
            if value < least:
                raise InputError(f"{name} is too small", operation="DataParallel", got=value, expected=f"≥ {least}")
        self.comm = comm
        self.microbatches = microbatches
        self.bucket_bytes = bucket_bytes
        self.average_every = average_every
        self._allocator = allocator
        self._stop = False

    def setup(self, model: Model, optimizer: Optimizer, plan: Plan) -> None:
        """See `Method.setup`."""
        layout = model.layout
        self.model, self.optimizer, self.plan = model, optimizer, plan
        self.shard = layout.whole()
        self.params = FlatBuffer(layout, self._allocator)
        self.grads = FlatBuffer(layout, self._allocator)
        self.optimizer_state = optimizer.init(self.shard, self._allocator)
        self.buckets = layout.buckets(self.bucket_bytes)
        self.step = 0
        self._seen = 0.0  # samples since the last averaging, this rank's
        model.initialise(self.params, plan.key.child("init"))
        verify_replicas(self.comm, self.params)

    def request_stop(self) -> None:
        """See `Method.request_stop`."""
        self._stop = True

    def advance(self, feed: Feed, until: int) -> Progress:
        """See `Method.advance`."""
        mine = feed.share(self.comm.rank, self.comm.size, self.microbatches)
        loss_sum, count, samples, stop = 0.0, 0.0, 0.0, False
        while self.step < self.plan.steps and not (self._at_commit() and (self.step >= until or stop)):
            tally = self._train_step(mine.batch(self.step))
            loss_sum, count, samples = loss_sum + tally[0], count + tally[1], samples + tally[2]
            stop = stop or tally[3] > 0
        lr = self.plan.schedule(max(self.step, 1))
        return Progress(self.step, loss_sum / count if count else float("nan"), int(samples), lr, stop)

    def _at_commit(self) -> bool:
        return not self.average_every or self.step % self.average_every == 0 or self.step == self.plan.steps

    def _train_step(self, microbatches: Iterable[Batch]) -> Array:
        """Take one step; return the sums over all ranks of loss, count, samples and requests to stop."""
        reduce = None if self.average_every else self._reduce
        own_loss, own_count, samples = self._gradients(list(microbatches), reduce)
        tally = self.comm.allreduce(np.array([own_loss, own_count, samples, self._stop], np.float64))
        self.step += 1
        if self.average_every:
            self._update(own_count, float(tally[0]), own_loss)
            self._seen += own_count
            if self._at_commit():
                self._average()
        else:
            reduce_gradients(self.comm, self.grads, self.buckets)
            self._update(float(tally[1]), float(tally[0]), own_loss)
        return tally

    def _gradients(self, microbatches: list[Batch], reduce: Reduce | None) -> tuple[float, float, int]:
        """Sum the gradients of this rank's samples into ``self.grads``."""
        self.grads.zero()
        rng = self.plan.key.child("train").at(self.step)
        loss_sum = count = 0.0
        for number, batch in enumerate(microbatches):
            key = rng if len(microbatches) == 1 else rng.child(f"microbatch{number}")
            loss, weight = self.model.loss_and_gradients(self.params, batch, self.grads, key, reduce)
            loss_sum, count = loss_sum + loss, count + weight
        return loss_sum, count, sum(len(batch) for batch in microbatches)

    def _update(self, count: float, loss: float, own_loss: float) -> None:
        """Divide, check, clip and update, everywhere alike; with local SGD, each rank its own gradient."""
        grads = self.grads.flat
        if count:
            divide(grads, count)
        check_finite(self.comm, loss, own_loss, grads, self.shard, self.step)
        if count:
            clip(grads, self.shard, self.plan)
            update(
                self.optimizer, self.params.flat, grads, self.optimizer_state, self.plan, self.step, self.shard
            )  # fmt: skip

    def _reduce(self, array: Array) -> Array:
        self.comm.allreduce(array, out=array)
        return array

    def _average(self) -> None:
        """Average parameters and optimizer state over the ranks, weighted by the samples each has seen."""
        total = float(self.comm.allreduce(np.float64(self._seen)))
        for array in (self.params.flat, *self.optimizer_state.values()):
            array *= array.dtype.type(self._seen / total)
            self.comm.allreduce(array, out=array)
        self._seen = 0.0

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """See `Method.evaluate`."""
        sums = None
        for batch in batches:
            sums = add_sums(sums, self.model.sums(self.params, batch))
        if sums is None:
            raise InputError("there is nothing to evaluate", operation="evaluate", got="no batches")
        return self.model.metrics(self.comm.allreduce(sums))

    def predict(self, inputs: Array) -> Array:
        """See `Method.predict`."""
        return self.model.predict(self.params, inputs)

    def state(self) -> State:
        """See `Method.state`."""
        pieces = pieces_of("params", self.params.flat, self.shard, "replicated")
        for slot, array in self.optimizer_state.items():
            pieces += pieces_of(f"optimizer.{slot}", array, self.shard, "replicated")
        return State(pieces, {"step": self.step})

    def load(self, state: State) -> None:
        """See `Method.load`."""
        fill("params", self.params.flat, self.shard, state.read)
        for slot, array in self.optimizer_state.items():
            fill(f"optimizer.{slot}", array, self.shard, state.read)
        self.step = int(state.scalars["step"])
