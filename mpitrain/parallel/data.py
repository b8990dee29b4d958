"""Data-parallel SGD: every rank holds the whole model and computes the gradient of its share of each batch.

The gradients are summed over the ranks and divided once by the global number of samples, so that the step is the one
a single rank would take on the whole batch, however unevenly it is shared.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.arrays import Allocator, Batch, FlatBuffer, plain
from mpitrain.comm import Communicator
from mpitrain.comm.codecs import Codec, CompressedSum, make_codec
from mpitrain.method.method import Feed, Method, Plan, Progress, Share
from mpitrain.method.state import Read, State, fill, pieces_of
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
from mpitrain.optim import Optimizer, finite

DEFAULT_BUCKET_BYTES = 4 << 20


@dataclass(frozen=True)
class Tally:
    """What the ranks sum at each step besides the gradients; it also carries what they must agree on."""

    loss: float = 0.0  # sum of the samples' losses
    count: float = 0.0  # what it is to be divided by
    samples: float = 0.0
    stops: float = 0.0  # ranks that were asked to stop
    bad: float = 0.0  # ranks whose own loss or gradient is not finite

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


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
        Largest piece in which gradients are reduced; a codec reduces all at once.
    codec : str or Codec, optional
        How gradients are compressed on the wire: a codec, or the name of one; None: not at all.
    allocator : Allocator
        Where parameters, gradients and optimizer state live.

    Notes
    -----
    Cost of a step beyond the gradient: an allreduce of the gradients, 2(p−1)/p · n bytes moved per rank where the
    library uses a ring, and one of five numbers.  With a codec: see there.
    """

    def __init__(
        self,
        comm: Communicator,
        *,
        microbatches: int = 1,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        codec: str | Codec | None = None,
        allocator: Allocator = plain,
    ) -> None:
        for name, value in (("microbatches", microbatches), ("bucket_bytes", bucket_bytes)):
            if value < 1:
                raise InputError(f"{name} is too small", operation="DataParallel", got=value, expected="at least 1")
        self.comm = comm
        self.microbatches = microbatches
        self.bucket_bytes = bucket_bytes
        self.codec = make_codec(codec) if isinstance(codec, str) else codec
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
        self._compressed: CompressedSum | None = None
        if self.codec:
            key = plan.key.child("codec")
            self._compressed = CompressedSum(self.comm, self.codec, layout, key, self._allocator)
        self.step = 0
        self._feed: Feed | None = None
        model.initialise(self.params, plan.key.child("init"))
        verify_replicas(self.comm, self.params)

    def request_stop(self) -> None:
        """See `Method.request_stop`."""
        self._stop = True

    def advance(self, feed: Feed, until: int) -> Progress:
        """See `Method.advance`."""
        mine = self._share(feed)
        total = Tally()
        while self.step < self.plan.steps and not (self._at_commit() and (self.step >= until or total.stops)):
            with self.comm.phase("data"):
                microbatches = list(mine.batch(self.step))
            with self.comm.phase("step"):
                total += self._train_step(microbatches)
        lr = self.plan.schedule(max(self.step, 1))
        loss = total.loss / total.count if total.count else float("nan")
        return Progress(self.step, loss, int(total.samples), lr, bool(total.stops))

    def _share(self, feed: Feed) -> Share:
        """Return this rank's share of a feed, which is cut once."""
        if self._feed is not feed:
            self._feed, self._own = feed, feed.share(self.comm.rank, self.comm.size, self.microbatches)
        return self._own

    def _at_commit(self) -> bool:
        """Tell whether parameters and optimizer state are now the same on all ranks."""
        return True

    def _train_step(self, microbatches: list[Batch]) -> Tally:
        """Take one step; return its sums over all ranks."""
        phase = self.comm.phase
        with phase("gradients"):
            own = self._gradients(microbatches, self._reduce)
        with phase("reduce"):
            total = self._sum(own)
            self._reduce_gradients(total.count)
        with phase("check"):
            good = not total.bad and finite(self.grads.flat)
            self._check_finite(good, microbatches)
        self.step += 1
        with phase("update"):
            self._update(total.count)
        return total

    def _check_finite(self, good: bool, microbatches: list[Batch]) -> None:
        """End the run unless all is well; else compute this rank's part again by itself, to see who is at fault."""

        def own_part_finite() -> bool:
            alone = self._gradients(microbatches, None)  # BatchNorm spread one rank's trouble to all
            return not alone.bad and finite(self.grads.flat)

        check_finite(self.comm, good, self.grads.flat, self.shard, self.step + 1, own_part_finite)

    def _sum(self, own: Tally) -> Tally:
        return Tally(*self.comm.allreduce(np.array(astuple(own), np.float64)).tolist())

    def _gradients(self, microbatches: list[Batch], reduce: Reduce | None) -> Tally:
        """Sum the gradients of this rank's samples into ``self.grads``."""
        self.grads.zero()
        rng = self.plan.key.child("train").at(self.step)
        loss_sum = count = 0.0
        for number, batch in enumerate(microbatches):
            key = rng.child(f"microbatch{number}")
            found = self.model.loss_and_gradients(self.params, batch, self.grads, key, reduce)
            loss, weight = _two_numbers(found)
            loss_sum, count = loss_sum + loss, count + weight
        samples = sum(len(batch) for batch in microbatches)
        return Tally(loss_sum, count, samples, float(self._stop), float(not np.isfinite(loss_sum)))

    def _reduce_gradients(self, count: float) -> None:
        if self._compressed:
            self._compressed.reduce(self.grads, self.step, count)
        else:
            reduce_gradients(self.comm, self.grads, self.buckets)

    def _update(self, count: float) -> None:
        """Divide, clip and update."""
        grads, shard = self.grads.flat, self.shard
        divide(grads, count)
        clip(grads, shard, self.plan)
        update(self.optimizer, self.params.flat, grads, self.optimizer_state, self.plan, self.step, shard)

    def _reduce(self, array: Array) -> Array:
        self.comm.allreduce(array, out=array)
        return array

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
        for prefix, buffer, kind in self._compressed.kept if self._compressed else ():
            pieces += pieces_of(f"codec.{prefix}", buffer.flat, buffer.layout.whole(), kind)
        return State(pieces, {"step": self.step})

    def load(self, scalars: Mapping[str, Any], read: Read) -> None:
        """See `Method.load`."""
        fill("params", self.params.flat, self.shard, read)
        for slot, array in self.optimizer_state.items():
            fill(f"optimizer.{slot}", array, self.shard, read)
        for prefix, buffer, _ in self._compressed.kept if self._compressed else ():
            fill(f"codec.{prefix}", buffer.flat, buffer.layout.whole(), read)
        self.step = int(scalars["step"])

    def load_parameters(self, read: Read) -> None:
        """See `Method.load_parameters`."""
        fill("params", self.params.flat, self.shard, read)


def _two_numbers(found: Any) -> tuple[float, float]:
    """Return what a model, perhaps a user's, gave as loss and count."""
    try:
        loss_sum, count = map(float, found)
    except (TypeError, ValueError) as error:
        raise InputError(
            "the model's loss_and_gradients gave no loss", got=reprlib.repr(found),
            expected="(loss_sum, count), two numbers",
        ) from error  # fmt: skip
    return loss_sum, count
