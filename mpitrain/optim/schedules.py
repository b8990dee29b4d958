"""Learning-rate schedules: pure functions of the number of the step, with nothing to save or restore."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from mpitrain._errors import InputError
from mpitrain._options import COUNT, FRACTION, POSITIVE, Checked, Interval, check, check_kind, construct, option


@dataclass(frozen=True, kw_only=True)
class Schedule(Checked):
    """Gives each step its learning rate: ``schedule(step)``."""

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step.

        Parameters
        ----------
        step : int
            Number of the step, from 1.
        """
        if step < 1:
            raise InputError(f"schedule {self.name}: steps count from 1", got=step, expected="1 or more")
        return self._after(step - 1)

    @abstractmethod
    def _after(self, done: int) -> float:
        """Return the learning rate of the step that follows ``done`` steps."""


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The same learning rate always.

    Parameters
    ----------
    lr : float
        Learning rate, above 0.
    """

    name: ClassVar[str] = "constant"

    lr: float = option(POSITIVE)

    def _after(self, done: int) -> float:
        return self.lr


@dataclass(frozen=True, kw_only=True)
class StepDecay(Schedule):
    """A learning rate that is multiplied by ``factor`` after every ``every`` steps.

    Parameters
    ----------
    lr : float
        Learning rate of the first steps, above 0.
    every : int
        Steps between two falls.
    factor : float
        Of each fall, in (0, 1].
    """

    name: ClassVar[str] = "step"

    lr: float = option(POSITIVE)
    every: int = option(COUNT)
    factor: float = option(Interval(0.0, 1.0, "(]"), 0.1)

    def _after(self, done: int) -> float:
        return float(self.lr * self.factor ** (done // self.every))


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from ``lr`` down to ``final * lr``, where it stays.

    Parameters
    ----------
    lr : float
        Learning rate of the first step, above 0.
    steps : int
        Steps until the end is reached; a warm-up in front is not counted.
    final : float
        The last learning rate as a fraction of the first, in [0, 1).

    Notes
    -----
    Source: Loshchilov, Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017, equation 5, without
    restarts.
    """

    name: ClassVar[str] = "cosine"

    lr: float = option(POSITIVE)
    steps: int = option(COUNT)
    final: float = option(FRACTION, 0.0)

    def _after(self, done: int) -> float:
        part = min(done / self.steps, 1.0)
        return self.lr * (self.final + (1.0 - self.final) * (1.0 + math.cos(math.pi * part)) / 2.0)


@dataclass(frozen=True, kw_only=True)
class WarmUp(Schedule):
    """A straight line up to another schedule's first learning rate, which that schedule then follows.

    Parameters
    ----------
    schedule : Schedule
        What follows; its own steps are counted from the end of the warm-up.
    steps : int
        Length of the warm-up; its last step has the full rate.
    start : float
        Where the line starts from, as a fraction of the full rate, in [0, 1).

    Notes
    -----
    Source: Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017, section 2.2; there
    ``start`` is one over the factor of `linear_scaling`.
    """

    name: ClassVar[str] = "warm-up"

    schedule: Schedule
    steps: int = option(COUNT)
    start: float = option(FRACTION, 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind("WarmUp", "schedule", self.schedule, Schedule, "a Schedule, e.g. Constant(lr=0.1)")

    def _after(self, done: int) -> float:
        if done >= self.steps:
            return self.schedule(done - self.steps + 1)
        return self.schedule(1) * (self.start + (1.0 - self.start) * (done + 1) / self.steps)


SCHEDULES: dict[str, type[Schedule]] = {cls.name: cls for cls in (Constant, Cosine, StepDecay)}


def make_schedule(name: str, *, warmup_steps: int = 0, warmup_start: float = 0.0, **options: Any) -> Schedule:
    """Return the schedule that ``name`` stands for.

    Parameters
    ----------
    name : str
        A key of `SCHEDULES`.
    warmup_steps : int
        Steps of linear warm-up in front of it; 0 for none.
    warmup_start : float
        See `WarmUp`.
    **options
        Options of the schedule itself; ``lr`` always.

    Raises
    ------
    InputError
        The name or an option is unknown, one is missing, or a value is not allowed.
    """
    check(f"schedule {name}", "warmup_steps", warmup_steps, Interval(0, math.inf, whole=True))
    check(f"schedule {name}", "warmup_start", warmup_start, FRACTION)
    schedule = construct("schedule", SCHEDULES, name, options)
    return WarmUp(schedule=schedule, steps=warmup_steps, start=warmup_start) if warmup_steps else schedule


def linear_scaling(lr: float, global_batch: int, base_batch: int) -> float:
    """Return the learning rate for ``global_batch`` samples a step, given one that suits ``base_batch``.

    Parameters
    ----------
    lr : float
        Learning rate found with ``base_batch``.
    global_batch, base_batch : int
        Samples in one step, over all ranks.

    Notes
    -----
    Source: Goyal et al. 2017, section 2.1: "when the minibatch size is multiplied by k, multiply the learning rate by
    k".
    """
    check("linear scaling", "lr", lr, POSITIVE)
    check("linear scaling", "global_batch", global_batch, COUNT)
    check("linear scaling", "base_batch", base_batch, COUNT)
    return lr * global_batch / base_batch
