"""What every rank of the benchmark does: all ways to train a model take their steps in turn, model after model."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from mpitrain._errors import MissingExtraError
from mpitrain._typing import Array
from mpitrain.arrays import Key
from mpitrain.comm import Communicator
from mpitrain.comm.bench import gloo
from mpitrain.comm.bench.meeting import meet
from mpitrain.comm.bench.ranks import versions
from mpitrain.comm.bench.results import Quantiles
from mpitrain.comm.machine import cpu_model, last_level_cache_bytes
from mpitrain.method import Plan
from mpitrain.nn import CrossEntropy, Network
from mpitrain.nn.costs import training_flops
from mpitrain.optim import Adam
from mpitrain.optim.kernel import LIBRARY
from mpitrain.parallel import DataParallel, GradientParallel
from mpitrain.parallel.synchronous import Synchronous
from mpitrain.train.bench.communication import communication_share
from mpitrain.train.bench.contest import contest
from mpitrain.train.bench.memory import memory
from mpitrain.train.bench.results import Contestant, Trained, TrainingReport
from mpitrain.train.bench.tasks import TASKS, Repeated, Steps, Task

METHODS: dict[str, Callable[[Communicator], Synchronous]] = {
    "data": DataParallel,
    "gradient 1": GradientParallel,
    "gradient 2": lambda comm: GradientParallel(comm, stage=2),
    "gradient 3": lambda comm: GradientParallel(comm, stage=3),
}
"""Ways of ours, by name."""

ALONE = "serial runs"
"""A run on each rank, all at once, that share nothing: what is lost to them is what a method costs."""

COMPARED = ("data", ALONE, "DDP, gloo", "PyTorch, serial runs")
"""Whom all others are compared with."""

_EVER = 10**9
_PRODUCT = 1024
_PRODUCTS = 7
_TRACED_S = 0.5
"""About how long steps are traced for the share of communication; three of them at least."""


@dataclass(frozen=True)
class Spec:
    """What is asked for; the same on all ranks.

    Parameters
    ----------
    models : tuple of str
        Some of `TASKS`.
    rounds : int
        Turns of each contestant.
    round_s : float
        About the seconds of a turn.
    batch : int, optional
        Samples a rank; None: each model's own.
    peers : bool
        Whether PyTorch takes part.
    command : tuple of str
        What the user typed, for the record.
    """

    models: tuple[str, ...] = tuple(TASKS)
    rounds: int = 15
    round_s: float = 0.15
    batch: int | None = None
    peers: bool = False
    command: tuple[str, ...] = ()


def measure(comm: Communicator, spec: Spec) -> TrainingReport:
    """Measure what is asked for, with one BLAS thread a rank.

    Parameters
    ----------
    comm : Communicator
        The world's.
    spec : Spec
        The same on all ranks.

    Returns
    -------
    TrainingReport
        The same on all ranks, but for ``about``, which is rank 0's view.

    Notes
    -----
    Collective.
    """
    alone = comm.split(comm.rank)
    assert alone is not None
    with threadpool_limits(1), _rivals(comm, spec.peers) as (rivals, notes):
        rate = product_flops_per_s(comm)
        models = []
        for name in spec.models:
            models.append(_train(comm, alone, TASKS[name].smaller(spec.batch), spec, rivals, rate))
            gc.collect()  # what ranks share goes back at the same point on all of them
    alone.free()
    return TrainingReport(list(spec.command), _about(comm, spec), rate, models, notes)


Rivals = Callable[[Communicator, Task], Mapping[str, Steps]]


@contextmanager
def _rivals(comm: Communicator, wanted: bool) -> Iterator[tuple[Rivals, list[str]]]:
    """Yield what gives the rivals in a task, and notes on who is missing.  Collective."""
    why = _missing(comm) if wanted else "not asked for (--peers)"
    place = meet(comm) if why is None else None
    if why is None and place is None:
        why = "no IPv4 address of rank 0's node can be reached from all ranks"
    if place is None:
        yield lambda comm, task: {}, [f"PyTorch left out: {why}"]
        return
    with gloo.group(comm, place):
        from mpitrain.train.bench.peers import peers

        yield peers, []


def _missing(comm: Communicator) -> str | None:
    """Return why some rank has no PyTorch; the same on all ranks."""
    try:
        gloo.check()
        problem = None
    except MissingExtraError as error:
        problem = str(error)
    return next(filter(None, comm.allgather_object(problem)), None)


def product_flops_per_s(comm: Communicator, dtype: str = "float32") -> float:
    """Return the operations a second of a rank's large product, the median, while all ranks do the same."""
    matrix = np.random.default_rng(0).standard_normal((_PRODUCT, _PRODUCT)).astype(dtype)
    out = np.empty_like(matrix)
    seconds = []
    for _ in range(_PRODUCTS):
        comm.barrier()
        began = time.perf_counter()
        np.matmul(matrix, matrix, out=out)
        seconds.append(time.perf_counter() - began)
    return float(comm.allreduce(2 * _PRODUCT**3 / float(np.median(seconds)), "mean"))


@dataclass(frozen=True)
class _Ours:
    """A method of ours on a task."""

    comm: Communicator
    network: Network
    method: Synchronous
    feed: Repeated

    @classmethod
    def of(cls, comm: Communicator, make: Callable[[Communicator], Synchronous], task: Task, rank: int) -> _Ours:
        network, method = Network(task.layer(), CrossEntropy()), make(comm)
        method.setup(network, Adam(), Plan(Key(0), lambda step: 1e-3, _EVER))
        return cls(comm, network, method, Repeated(task.batch(rank)))

    def __call__(self, steps: int) -> None:
        self.method.advance(self.feed, self.method.step + steps)


def _train(comm: Communicator, alone: Communicator, task: Task, spec: Spec, rivals: Rivals, rate: float) -> Trained:
    """Let all contestants train one model."""
    ours = {name: _Ours.of(comm, make, task, comm.rank) for name, make in METHODS.items()}
    serial = _Ours.of(alone, DataParallel, task, comm.rank)
    contestants: dict[str, Steps] = {**ours, ALONE: serial, **rivals(comm, task)}
    seconds = contest(comm, contestants, spec.rounds, spec.round_s)
    flops = training_flops(task.layer(), task.shape)
    found = [_contestant(name, seconds, comm.size * task.units, flops / rate, ours.get(name), task) for name in seconds]
    parameters = sum(segment.size for segment in serial.network.layout)
    return Trained(task.name, task.title, task.unit, task.units, parameters, flops, found)


def _contestant(
    name: str, seconds: Mapping[str, Array], units: int, products_s: float, ours: _Ours | None, task: Task
) -> Contestant:
    """Return what is told of a contestant.  Collective for ours."""
    own = seconds[name]
    median = float(np.median(own))
    ratios = {each: Quantiles.of(seconds[each] / own) for each in COMPARED if each in seconds and each != name}
    told = Contestant(name, Quantiles.of(own), units / median, products_s / median, ratios)
    if ours is None:
        return told
    share = communication_share(ours.comm, ours, max(3, int(_TRACED_S / median)))
    held = memory(ours.comm, task, ours.network, ours.method)
    return Contestant(name, told.seconds, told.per_s, told.share_of_products, ratios, share, held)


def _about(comm: Communicator, spec: Spec) -> dict[str, Any]:
    return {
        "ranks": comm.size,
        "transport": comm.transport,
        "machine": {
            "cpu": cpu_model(), "cpus": os.cpu_count(), "last_level_cache_bytes": last_level_cache_bytes(),
        },
        "versions": {"python": platform.python_version(), **versions()},
        "mpi_library": comm.library,
        "compiled_adam": LIBRARY.loaded is not None,
        "blas_threads": 1,
        "rounds": spec.rounds,
        "round_s": spec.round_s,
    }  # fmt: skip


def check(models: Sequence[str]) -> None:
    """Refuse names of models that are not there.

    Raises
    ------
    ValueError
        With the first such name, and those that are there.
    """
    for name in models:
        if name not in TASKS:
            raise ValueError(f"no {name!r}; expected some of {', '.join(TASKS)}")
