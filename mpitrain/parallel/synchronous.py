"""What the synchronous methods share: the walk over steps, the gradient of a rank's share, evaluation, and the state.

A method is left to say where parameters, gradients and optimizer state lie (`Synchronous._allocate`), how the gradients
of all ranks are summed (`Synchronous._reduce_gradients`), and how all get what was updated (`Synchronous._hand_out`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mpitrain._errors import InputError
from mpitrain._options import check_kind, check_whole
from mpitrain._typing import Array
from mpitrain.arrays import Allocator, Batch, FlatBuffer, Gradients, Layout, ParameterSource, is_cupy, plain
from mpitrain.arrays.flatbuffer import sha256
from mpitrain.comm import Communicator
from mpitrain.method.evaluation import Sums, filled, something
from mpitrain.method.method import Feed, Method, Plan, Progress, Share
from mpitrain.method.precision import Precision
from mpitrain.method.state import Kind, Read, State
from mpitrain.method.steps import Part, Reach, add_sums, all_finite, check_finite, clip, divide, update
from mpitrain.nn.model import Model, Reduce
from mpitrain.optim import Optimizer, Terms, finite, squares_finite
from mpitrain.parallel import in_place
from mpitrain.parallel.across import given_here, reach, whole_tensor
from mpitrain.parallel.agreement import Agreement
from mpitrain.parallel.checks import check_parts, check_ranks, checked, microbatches_of
from mpitrain.parallel.gathered import GatheredParameters
from mpitrain.parallel.in_place import CommonGradients
from mpitrain.parallel.passes import Passes
from mpitrain.parallel.tally import Tally

DEFAULT_BUCKET_BYTES = 4 << 20


class _NotSetUpError(InputError, AttributeError):
    """What `setup` makes is asked for before it."""


class Synchronous(Method):
    """All ranks take every step together, each on its share of the batch.

    Parameters
    ----------
    comm : Communicator
        The ranks that share each batch.
    microbatches, bucket_bytes : int
        At least 1.
    allocator : Allocator, optional
        Where memory of this rank's comes from; None: ordinary memory, and where a method has ranks share some, that.
    across : Communicator, optional
        The ranks that divide the model and see the same samples, the ``"tensor"`` axis of a mesh of which ``comm`` is
        another axis; None: each rank of ``comm`` has all of the model.
    precision : Precision, optional
        In which 16-bit type the passes are computed; None: in the model's own type.

    Attributes
    ----------
    step : int
        Steps done since training began.
    skipped : int
        Of these, the ones that changed nothing, see `Precision`.
    rounded : FlatBuffer, optional
        The parameters in 16 bits that passes read, where these are a copy of ``params``; None where they are not.

    Notes
    -----
    With ``across``: what is global of the gradients (their norm, whether they are finite) and stops are agreed on by
    all ranks of both; tensors that all ranks of ``across`` hold count once.  Where a rank has only terms of a gradient
    (`Segment.axes`), they are summed over ``across`` first.
    """

    kind: Kind = "replicated"
    """What the parts of a rank are to the others."""

    reads_all: ClassVar[bool] = True
    """Whether each rank asks for all tensors when it loads, also for those of which others update all."""

    grads: Gradients
    parts: tuple[Part, ...]
    rounded: FlatBuffer | None = None

    def __init__(
        self,
        comm: Communicator,
        microbatches: int,
        bucket_bytes: int,
        allocator: Allocator | None,
        across: Communicator | None = None,
        precision: Precision | None = None,
    ) -> None:
        name = type(self).__name__
        check_ranks(name, comm, across)
        check_kind(name, "precision", precision, (Precision, type(None)), 'a Precision, e.g. Precision("bfloat16")')
        check_whole(name, "microbatches", microbatches, 1)
        check_whole(name, "bucket_bytes", bucket_bytes, 1)
        self.comm, self.across, self.precision = comm, across, precision
        self.microbatches = microbatches
        self.bucket_bytes = bucket_bytes
        self._private, self._allocator = allocator, allocator or plain
        self._agreement, self._stop = Agreement(comm, across), False

    @property
    def _owners(self) -> Communicator:
        """The ranks that hold the same tensors."""
        return self.comm

    def setup(self, model: Model, optimizer: Optimizer, plan: Plan) -> None:
        """See `Method.setup`."""
        check_parts(model, optimizer, plan)
        self.model, self.optimizer, self.plan = model, optimizer, plan
        self._agreement.check_settings(optimizer, plan)  # first, for how memory is laid out follows from these
        self.step = self.skipped = 0
        self._feed: Feed | None = None
        self._terms = [segment.name for segment in model.layout if segment.axes - {"data"}]
        self._passes = Passes(model, plan.key, self.precision, self._allocator)
        self._allocate(self._held(model.layout))
        self._initialise()

    def _held(self, layout: Layout) -> Layout:
        """Return the layout of those of the model's tensors that this rank holds: of all of them."""
        return layout

    @abstractmethod
    def _allocate(self, layout: Layout) -> None:
        """Set ``params``, ``grads`` and ``parts``, of the tensors that this rank holds."""

    @abstractmethod
    def _initialise(self) -> None:
        """Fill ``params`` with the model's initial values, verified between ranks."""

    def _begin(self, layout: Layout, start: int, parts: Sequence[Part]) -> FlatBuffer:
        """Fill parts of a stretch of the model, which begins at ``start`` and is laid out as ``layout`` says.

        Return the whole stretch in memory of this rank's own: what is shared would hide that ranks differ.
        """
        initial = FlatBuffer(layout, self._allocator)
        self._draw(initial)
        for part in parts:
            part.params[...] = initial.flat[part.shard.start - start : part.shard.stop - start]
        return initial

    def _draw(self, params: FlatBuffer) -> None:
        """Fill a buffer of this rank's tensors with the model's initial values."""
        self.model.initialise(params, self.plan.key.child("init"))

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Say that an attribute is missing because `setup` makes it; called for missing ones alone."""
            if name.startswith("__") or "plan" in vars(self):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            raise _NotSetUpError(f"has no {name} before setup", operation=type(self).__name__,
                                 remedy="call setup(model, optimizer, plan)")  # fmt: skip

    def request_stop(self) -> None:
        """See `Method.request_stop`."""
        self._stop = True

    def advance(self, feed: Feed, until: int) -> Progress:
        """See `Method.advance`."""
        check_whole("advance", "until", until, 0)
        mine = self._own_shares(feed)
        total = Tally()
        while self.step < self.plan.steps and not (self._at_commit(self.step) and (self.step >= until or total.stops)):
            with self.comm.phase("data"):
                microbatches = [each for share in mine for each in microbatches_of(share, self.step, self.microbatches)]
            with self.comm.phase("step"):
                total += self._train_step(microbatches)
            self.step += 1  # once nothing can refuse it any more
        lr = self.plan.schedule(max(self.updates, 1))
        loss = total.loss / total.count if total.count else float("nan")
        return Progress(self.step, loss, int(total.samples), lr, bool(total.stops), self.skipped, self.loss_scale)

    @property
    def loss_scale(self) -> float | None:
        """What the next step's loss is multiplied by; None where it is not scaled."""
        return self._passes.scaler.scale if self._passes.scaler else None

    @property
    def updates(self) -> int:
        """How many steps changed the parameters; optimizers and schedules of learning rates count these."""
        return self.step - self.skipped

    @property
    def shares(self) -> tuple[tuple[int, int], ...]:
        """Which shares of each batch this rank computes, each as (number, of how many)."""
        return ((self.comm.rank, self.comm.size),)

    @property
    def evaluation_shares(self) -> tuple[tuple[int, int], ...]:
        """Which shares of what is evaluated this rank hands in."""
        return self.shares

    def _own_shares(self, feed: Feed) -> list[Share]:
        """Return this rank's shares of a feed, which is cut once."""
        if not hasattr(self, "plan"):
            raise InputError("comes after setup", operation="advance", remedy="call setup(model, optimizer, plan)")
        if self._feed is None or self._feed is not feed:
            check_kind("advance", "feed", feed, Feed, "a Feed, e.g. Batches(dataset, batch_size=64, seed=0)")
            self._agreement.check_feed(feed)
            self._feed, self._cut = feed, [feed.share(*share, self.microbatches) for share in self.shares]
        return self._cut

    def _at_commit(self, step: int) -> bool:
        """Tell whether parameters and optimizer state are the same on all ranks after so many steps."""
        return True

    def _train_step(self, microbatches: list[Batch]) -> Tally:
        """Take one step; return its sums over all ranks."""
        with self.comm.phase("gradients"):
            own = self._gradients(microbatches, self.grads, self._reduce)
        grads = self.grads
        total = self._published(grads, own) if isinstance(grads, CommonGradients) else self._reduced(own)
        if not self._is_taken(not total.bad, microbatches):
            return total.untrained()
        total.check_count(self.step + 1)
        with self.comm.phase("update"):
            self._update(total.count)
        self._hand_out()
        return total

    def _reduced(self, own: Tally) -> Tally:
        """Sum the gradients over all ranks; return their tally, which tells whether all is finite, on all of them."""
        with self.comm.phase("reduce"):
            self._sum_terms()
            self._reduce_gradients()
        with self.comm.phase("check"):
            return self._agreement.total(replace(own, bad=float(own.bad or not all_finite(self.parts))))

    @abstractmethod
    def _reduce_gradients(self) -> None:
        """Sum the gradients of all ranks into those of this rank's parts.  Collective."""

    def _update(self, count: float) -> None:
        """Sum where that is left to do, divide, clip and update; in one pass where nothing is clipped."""
        if isinstance(self.grads, CommonGradients):
            self._update_mean(self.parts[0], self.grads.terms(count))
            return
        if in_place.sums_while_updating(self.optimizer, self.plan) and not is_cupy(self.parts[0].params):
            for part in self.parts:
                terms = Terms((part.grads,), self._passes.scale * count, parameters_are_read=self._parameters_are_read)
                self._update_mean(part, terms)
            return
        divide(self.parts, self._passes.scale * count)
        clip(self.parts, self.plan, self._over_model())
        update(self.optimizer, self.parts, self.plan, self.updates + 1, self._over_tensors())

    @property
    def _parameters_are_read(self) -> bool:
        """Whether other ranks read the parameters that this rank updates, where they lie."""
        return isinstance(self.params, GatheredParameters) and self.params.shared and not self.precision

    def _over_model(self) -> Reach:
        """Return over which ranks a sum over the whole model goes."""
        return reach(self.across, self.params.layout)

    def _over_tensors(self) -> Reach:
        """Return over which ranks a sum over each whole tensor goes."""
        return reach(self.across, self.params.layout)

    def _hand_out(self) -> None:
        """Let all ranks have what was updated, and what was read of them: nothing to do where each updates all."""

    def _gradients(self, microbatches: list[Batch], grads: Gradients, reduce: Reduce | None) -> Tally:
        """Sum the gradients of this rank's samples, times the scale of this step, into ``grads``."""
        loss_sum, count = self._passes.gradients(self._to_read(), microbatches, grads, reduce, self.step)
        samples = sum(len(batch) for batch in microbatches)
        return Tally(loss_sum, count, samples, float(self._stop), float(not np.isfinite(loss_sum + count)))

    def _to_read(self) -> ParameterSource:
        """Return what the passes of a step read: the parameters, or their copy in 16 bits, made anew."""
        if self.rounded is None:
            return self.params
        with self._passes.overflowing():
            self.rounded.flat[...] = self.params.flat
        return self.rounded

    def _published(self, grads: CommonGradients, own: Tally) -> Tally:
        """Let all ranks read this one's gradients, which they sum while they update; return what `_reduced` does."""
        with self.comm.phase("check"):
            self._sum_terms()
            own = replace(own, bad=float(own.bad or not squares_finite(grads.flat)))
        with self.comm.phase("reduce"):
            grads.reduce()
            total = self._agreement.total(own)
        return self._rejudged(own, total) if total.bad else total

    def _rejudged(self, own: Tally, total: Tally) -> Tally:
        """Look at the sums themselves, as a rank found something not to be finite, or its square."""
        bad = not np.isfinite(own.loss + own.count) or not all_finite(self._with_sums())
        return replace(total, bad=self._agreement.total(Tally(bad=float(bad))).bad)

    def _with_sums(self) -> Sequence[Part]:
        """Return this rank's parts with the sums of their gradients, which are not written where all ranks read."""
        if not isinstance(self.grads, CommonGradients):
            return self.parts
        (part,) = self.parts
        return (replace(part, grads=self.grads.terms(1.0).sum()),)

    def _update_mean(self, part: Part, terms: Terms) -> None:
        number = self.updates + 1
        self.optimizer.update_mean(part.params, terms, part.state, self.plan.schedule(number), number, part.shard)

    def _sum_terms(self) -> None:
        """Sum the gradients of which the ranks that divide the model have terms.  Collective over them."""
        if self.across and self._terms:
            terms = [self.grads.views[name] for name in self._terms if name in self.grads.views]
            self.across.allreduce(terms, out=terms)

    def _reduce(self, array: Array) -> Array:
        self._owners.allreduce(array, out=array)
        return array

    def _is_taken(self, good: bool, microbatches: list[Batch]) -> bool:
        """Tell whether a step is taken: where the loss is scaled, it is skipped unless all is well.

        Parameters
        ----------
        good : bool
            Whether loss and gradients are finite, on all ranks of all axes; the same on all of these.

        Raises
        ------
        NonFiniteError
            They are not, and the loss is not scaled, or too many steps in a row were skipped.
        """
        if self._passes.scaler is None:
            self._check_finite(good, microbatches)
            return True
        self._passes.scaler.judge(good, self.step + 1)
        self.skipped += not good
        return good

    def _check_finite(self, good: bool, microbatches: list[Batch]) -> None:
        """End the run unless all is well; compute this rank's part again by itself, to see who is at fault."""
        if good:
            return

        def own_part_finite() -> bool:
            grads = FlatBuffer(self.params.layout.astype(self.model.layout.dtype), self._allocator)
            alone = self._gradients(microbatches, grads, None)  # BatchNorm spread one rank's trouble to all
            return not alone.bad and finite(grads.flat)

        check_finite(self.comm, good, self._with_sums(), self.step + 1, own_part_finite, self.across)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """See `Method.evaluate`."""
        sums, params = None, self.whole()
        for batch in checked(batches):
            sums = add_sums(sums, self.model.sums(params, batch))
        total = self.comm.allreduce(something(filled(self.comm, sums)))
        return self._metrics(total)

    def _metrics(self, total: Sums) -> dict[str, Any]:
        """Return the metrics of sums over all batches, whose bits may differ between ranks that divide the model."""
        return self.model.metrics(self.across.broadcast(total) if self.across else total)

    def predict(self, inputs: Array) -> Array:
        """See `Method.predict`."""
        return self.model.predict(self.whole(), inputs)

    def weights_sha256(self) -> str:
        """See `Method.weights_sha256`."""
        layout, params = self.params.layout, self.whole()
        names = sorted(segment.name for segment in layout)
        return sha256(whole_tensor(self.across, layout[name], params.views[name]) for name in names)

    def state(self) -> State:
        """See `Method.state`."""
        pieces = (piece for part in self.parts for piece in part.pieces(self.kind))
        scalars: dict[str, Any] = {"step": self.step}
        if self.skipped:
            scalars["skipped"] = self.skipped
        if self._passes.scaler:
            scalars["loss_scale"] = self._passes.scaler.state()
        return State(given_here(self.across, pieces), scalars)

    def load(self, scalars: Mapping[str, Any], read: Read) -> None:
        """See `Method.load`."""
        for part in self.parts:
            part.load_state(read, self.reads_all)
        self.load_parameters(read)
        self.step, self.skipped = int(scalars["step"]), int(scalars.get("skipped", 0))
        if self._passes.scaler and "loss_scale" in scalars:
            self._passes.scaler.load(scalars["loss_scale"])

    def load_parameters(self, read: Read) -> None:
        """See `Method.load_parameters`."""
        for part in self.parts:
            part.load_parameters(read, self.reads_all)

    def _load_shared(self, read: Read) -> None:
        """Load parameters that are written when no rank reads what is there now, for ``read`` or to predict."""
        found = [replace(part, params=part.params.copy()) for part in self.parts]
        for each in found:
            each.load_parameters(read, self.reads_all)
        self._owners.barrier()
        for part, each in zip(self.parts, found, strict=True):
            part.params[...] = each.params
        self._hand_out()
