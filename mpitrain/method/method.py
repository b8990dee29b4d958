"""The contract of a method: how gradients become parameters.  Everything else is shared between methods."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from mpitrain._errors import InputError
from mpitrain._options import POSITIVE, Interval, check, check_kind, check_whole
from mpitrain._typing import Array
from mpitrain.arrays import Batch, FlatBuffer, Key, ParameterSource
from mpitrain.method.state import Read, State
from mpitrain.nn.model import Model
from mpitrain.optim.optimizer import Optimizer

Schedule = Callable[[int], float]
"""Learning rate of a step, counted from 1."""


class Share(Protocol):
    """One rank's part of each batch, as a pure function of the step: nothing to save, nothing to rewind."""

    def batch(self, step: int) -> Sequence[Batch]:
        """Return this share of the global batch of ``step`` (from 0).

        Returns
        -------
        sequence of Batch
            As many as `Feed.share` was asked for microbatches, on every rank: a `Batch` of no samples where this share
            has none.
        """
        ...


@runtime_checkable
class Feed(Protocol):
    """The global batches of a run.

    The method, not the feed, knows how a batch is split (over ranks, clients, tickets), so it asks for its own share.
    """

    def share(self, rank: int, size: int, microbatches: int) -> Share:
        """Return one of ``size`` shares, each global batch cut into microbatches first."""
        ...


@dataclass(frozen=True)
class Progress:
    """What happened since the last call of `Method.advance`; the same on all ranks.

    Parameters
    ----------
    step : int
        Units done since training began.
    loss : float
        Mean loss of the samples trained on since the last call.
    samples : int
        Number of those samples, over all ranks.
    lr : float
        Learning rate of the last step.
    stop_requested : bool
        Some rank was asked to stop (`Method.request_stop`).
    skipped : int
        How many units since training began changed nothing, because gradients overflowed in float16 (`Precision`).
    loss_scale : float, optional
        What the next step's loss is multiplied by; None where it is not scaled.
    """

    step: int
    loss: float
    samples: int
    lr: float
    stop_requested: bool
    skipped: int = 0
    loss_scale: float | None = None


_RATE = Interval(-math.inf, math.inf, "()")


@dataclass(frozen=True)
class Plan:
    """What a method is set up with, besides the model and the optimizer.

    Parameters
    ----------
    key : Key
        The run's random key.
    schedule : callable
        Learning rate of a step.
    steps : int
        Last step of the run, at least 0; a method commits there.
    clip_norm, clip_value : float, optional
        Bounds on the gradient's global norm, and on each of its elements; above 0.

    Raises
    ------
    InputError
        One of them is not that.
    """

    key: Key
    schedule: Schedule
    steps: int
    clip_norm: float | None = None
    clip_value: float | None = None

    def __post_init__(self) -> None:
        check_kind("Plan", "key", self.key, Key, "a Key, e.g. Key(seed=0)")
        if not callable(self.schedule):
            raise InputError(
                "schedule is no schedule", operation="Plan", got=repr(self.schedule),
                expected="a function of the step, e.g. Constant(lr=1e-3)",
            )  # fmt: skip
        check_whole("Plan", "steps", self.steps, 0)
        for step in (1, max(self.steps, 1)):
            rate: Any = self.schedule(step)
            rate = rate.item() if getattr(rate, "ndim", None) == 0 else rate  # NumPy's and JAX's schedules give arrays
            check("Plan", f"the learning rate of step {step}", rate, _RATE)
        for name in ("clip_norm", "clip_value"):
            if (bound := getattr(self, name)) is not None:
                check("Plan", name, bound, POSITIVE)


class Method(ABC):
    """Turns gradients into parameters.  All calls are collective over the method's communicator."""

    params: ParameterSource
    step: int
    skipped: int = 0
    """How many of these steps changed nothing, because gradients overflowed in float16."""

    @property
    def loss_scale(self) -> float | None:
        """What the next step's loss is multiplied by; None where it is not scaled."""
        return None

    @abstractmethod
    def setup(self, model: Model, optimizer: Optimizer, plan: Plan) -> None:
        """Allocate and initialise: the same parameters on every layout, verified between ranks by hash."""

    @abstractmethod
    def advance(self, feed: Feed, until: int) -> Progress:
        """Train to the first commit point at or after step ``until``, or to one after a stop was requested.

        At a commit point parameters and optimizer state are whole and agree between ranks, so that they may be
        evaluated, saved or resized.
        """

    @abstractmethod
    def request_stop(self) -> None:
        """Ask all ranks to return from `advance` at the next commit point, once and for all: later calls take one step.

        Local; safe in a signal handler.
        """

    @abstractmethod
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Return metrics over all ranks' batches, weighted by samples; the same on all ranks."""

    @abstractmethod
    def predict(self, inputs: Array) -> Array:
        """Return the model's outputs for ``inputs``, shape (n, …), the same on all ranks."""

    def whole(self) -> FlatBuffer:
        """Return all parameters of this rank's model; read only, and valid until `advance`.  Collective.

        They are `params` themselves where each rank holds all of its model, and are gathered where it does not.
        """
        found = self.params
        assert isinstance(found, FlatBuffer)  # else a method overrides this one
        return found

    def weights_sha256(self) -> str:
        """Return a hash of all parameters, the same on all ranks and however they are divided.  Collective."""
        return self.whole().sha256()

    @abstractmethod
    def state(self) -> State:
        """Return what a checkpoint holds, in global coordinates; the pieces are views, valid until `advance`."""

    @abstractmethod
    def load(self, scalars: Mapping[str, Any], read: Read) -> None:
        """Continue from a state that any method, on any number of ranks, saved.

        Parameters
        ----------
        scalars : mapping
            As `state` gave them.
        read : callable
            Returns a whole tensor by its name.  A method that divides tensors by itself asks on each rank for those
            that this rank keeps; it must not communicate then.
        """

    @abstractmethod
    def load_parameters(self, read: Read) -> None:
        """Begin with the parameters of another run, and an optimizer that has seen nothing; ``read`` as for `load`."""
