"""What a pipeline loses to filling and draining: told from a trace of some steps, by formula, and by the simulator.

A rank's work is the time of its forward and backward passes less its waits for messages.  The overhead is what the
passes of a step take in all, by the mean work of the ranks, less 1: (time − ideal) / ideal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mpitrain.parallel.pipeline import FAMILIES, Costs, PipelineParallel, Sizes, simulate

_ALL, _PASSES = "gradients", ("forward", "backward", "backward input", "backward weight")
"""Phases of `PipelineParallel` and its executor."""


@dataclass(frozen=True)
class Overhead:
    """Of a pipeline, as a part of the work.

    Parameters
    ----------
    measured : float
        In steps that were traced.
    simulated : float
        Of the schedule, if each rank's passes take what they took on average, and messages nothing.
    formula : float
        Of the schedule, with F = B = W on all ranks.
    """

    measured: float
    simulated: float
    formula: float


def overhead(method: PipelineParallel, events: Iterable[dict[str, Any]], stages: Sequence[int]) -> Overhead:
    """Return the overhead of a pipeline.

    Parameters
    ----------
    method : PipelineParallel
        Which schedule.
    events : iterable of dict
        Of a trace of some of its steps.
    stages : sequence of int
        The place in the pipeline of each rank of the trace.
    """
    slices = [each for each in events if each["ph"] == "X"]
    whole_us = sum(each["dur"] for each in slices if each["cat"] == "phase" and each["name"] == _ALL)
    work = _work(slices)
    simulated = simulate(method.schedule, _costs(method.sizes, work, stages)).overhead
    formula = FAMILIES[method.schedule.name].overhead(method.sizes)
    return Overhead(whole_us / sum(each.total_us for each in work.values()) - 1, float(simulated), float(formula))


@dataclass
class _Work:
    """Passes of one kind on a rank."""

    total_us: float = 0.0
    count: int = 0

    @property
    def mean_us(self) -> float:
        return self.total_us / self.count


_Found = dict[tuple[int, str], _Work]
"""By rank of the trace, and by phase."""


def _work(slices: Sequence[dict[str, Any]]) -> _Found:
    """Return what the passes of each rank took, but for waits for the pipeline's messages."""
    found, ends_us = _Found(), dict[int, tuple[float, str]]()
    for each in sorted(slices, key=lambda event: event["ts"]):
        rank, name = each["pid"], each["name"]
        if each["cat"] == "phase" and name in _PASSES:
            entry = found.setdefault((rank, name), _Work())
            entry.total_us, entry.count = entry.total_us + each["dur"], entry.count + 1
            ends_us[rank] = each["ts"] + each["dur"], name
        elif _is_message(each) and each["ts"] < ends_us.get(rank, (0.0, ""))[0]:  # else it was between two passes
            found[rank, ends_us[rank][1]].total_us -= each["dur"]
    return found


def _is_message(event: dict[str, Any]) -> bool:
    return (event["cat"], event["args"].get("communicator")) == ("wait", "pipe")


def _costs(sizes: Sizes, work: _Found, stages: Sequence[int]) -> Costs:
    """Return what an operation takes on each rank of the pipeline, the mean over its stages and over equal ranks."""

    def mean_us(rank: int, name: str) -> float | None:
        own = [work[pid, name].mean_us for pid, place in enumerate(stages) if place == rank and (pid, name) in work]
        return sum(own) / len(own) if own else None

    def of(name: str, both: str = "") -> list[float]:
        found = []
        for stage in range(sizes.stages):
            rank = sizes.rank_of(stage)
            alone = mean_us(rank, name)
            found.append((mean_us(rank, both) or 0.0) / 2 if alone is None else alone)
        return found

    return Costs(of("forward"), of("backward input", "backward"), of("backward weight", "backward"))
