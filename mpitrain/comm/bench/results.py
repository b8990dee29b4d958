"""What a benchmark found: plain data, its form as JSON, and the few formulas that turn times into bandwidths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from mpitrain._errors import InputError
from mpitrain._typing import Array

VERSION = 1
"""Of the JSON form."""

_DIGITS = 4


@dataclass(frozen=True)
class Quantiles:
    """Where a sample of numbers lies.

    Parameters
    ----------
    count : int
        Numbers in the sample.
    p10, p25, p50, p75, p90 : float
        Its quantiles; p50 is the median.
    """

    count: int
    p10: float
    p25: float
    p50: float
    p75: float
    p90: float

    @classmethod
    def of(cls, sample: Array) -> Quantiles:
        """Return those of a sample of one number or more, in the digits that count: clocks give no more."""
        found = np.quantile(sample, (0.10, 0.25, 0.50, 0.75, 0.90))
        return cls(sample.size, *(float(f"{value:.{_DIGITS}g}") for value in found))

    @classmethod
    def across(cls, found: Iterable[Quantiles]) -> Quantiles:
        """Return those of several rounds: of each quantile, the median over the rounds."""
        rounds = list(found)
        middle = {name: median(getattr(each, name) for each in rounds) for name in ("p10", "p25", "p50", "p75", "p90")}
        return cls(sum(each.count for each in rounds), **middle)


@dataclass(frozen=True)
class Rivalry:
    """A rival's calls, each compared with ours of the same turn.

    Parameters
    ----------
    seconds : Quantiles
        The rival's time.
    ratio : Quantiles
        The rival's time by ours, turn by turn; above 1 ours is the faster.
    behind_s : Quantiles
        Our time less the rival's, turn by turn, in seconds.
    """

    seconds: Quantiles
    ratio: Quantiles
    behind_s: Quantiles

    @classmethod
    def of(cls, theirs: Array, ours: Array) -> Rivalry:
        """Compare times of the same turns."""
        return cls(Quantiles.of(theirs), Quantiles.of(theirs / ours), Quantiles.of(ours - theirs))

    @classmethod
    def across(cls, found: Iterable[Rivalry]) -> Rivalry:
        """Return that of several rounds."""
        rounds = list(found)
        return cls(
            Quantiles.across(each.seconds for each in rounds),
            Quantiles.across(each.ratio for each in rounds),
            Quantiles.across(each.behind_s for each in rounds),
        )


@dataclass(frozen=True)
class Measurement:
    """One of our ways to call a collective, at one size, beside the rivals that ran in the same turns.

    Parameters
    ----------
    operation, variant, transport : str
        What was called, and on which transport.
    size_bytes : int
        As it was asked for.
    total_bytes : int
        Of the whole array: what an allgather results in, what a reduce_scatter starts from.
    seconds : Quantiles
        Our time, on the slowest rank of each turn.
    rivals : dict of str to Rivalry
        ``mpi4py``, and ``gloo`` where it took part.
    """

    operation: str
    variant: str
    transport: str
    size_bytes: int
    total_bytes: int
    seconds: Quantiles
    rivals: dict[str, Rivalry]

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What is the same in every launch."""
        return self.operation, self.variant, self.transport, self.size_bytes


@dataclass(frozen=True)
class Copy:
    """How fast the ranks copy memory, all at once.

    Parameters
    ----------
    size_bytes : int
        What each rank copies.
    buffers : int
        Pairs of arrays that it walks through.
    seconds : Quantiles
        Of one copy, on the slowest rank.
    """

    size_bytes: int
    buffers: int
    seconds: Quantiles


@dataclass(frozen=True)
class Launch:
    """What one world of ranks measured.

    Parameters
    ----------
    component : str
        How the MPI library was set up; ``default``: as it is.
    round : int
        Launches are repeated in rounds.
    about : dict
        Versions, machine, layout, settings.
    copies : list of Copy
        One per size.
    measurements : list of Measurement
        One per operation, size, variant and transport.
    notes : list of str
        What was left out, and why.
    """

    component: str
    round: int
    about: dict[str, Any]
    copies: list[Copy]
    measurements: list[Measurement]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> bytes:
        """Return the launch as text."""
        return TypeAdapter(Launch).dump_json(self)

    @classmethod
    def from_json(cls, text: bytes) -> Launch:
        """Return the launch that `to_json` wrote.

        Raises
        ------
        InputError
            The text is anything else.
        """
        launch: Launch = _parsed(cls, text)
        return launch


@dataclass(frozen=True)
class Report:
    """All launches of one command.

    Parameters
    ----------
    command : list of str
        As it was typed.
    launches : list of Launch
        Those that came to an end.
    failures : list of str
        A line for each that did not, or that had nothing to measure.
    version : int
        Of this form.
    """

    command: list[str]
    launches: list[Launch]
    failures: list[str]
    version: int = VERSION

    def to_json(self) -> bytes:
        """Return the report as text for programs, without a space."""
        return TypeAdapter(Report).dump_json(self)

    @classmethod
    def from_json(cls, text: bytes) -> Report:
        """Return the report that `to_json` wrote.

        Raises
        ------
        InputError
            The text is anything else.
        """
        report: Report = _parsed(cls, text)
        return report

    def components(self) -> list[str]:
        """Return the set-ups of the MPI library that were measured, in the order of their first launch."""
        return list(dict.fromkeys(launch.component for launch in self.launches))

    def measurements(self, component: str) -> dict[tuple[str, str, str, int], Measurement]:
        """Return what was measured with a set-up, over all rounds, by `Measurement.key`."""
        return self._by_component.get(component, {})

    @cached_property
    def _by_component(self) -> dict[str, dict[tuple[str, str, str, int], Measurement]]:
        found: dict[str, dict[tuple[str, str, str, int], list[Measurement]]] = {}
        for launch in self.launches:
            for measurement in launch.measurements:
                found.setdefault(launch.component, {}).setdefault(measurement.key, []).append(measurement)
        return {name: {key: _merged(rounds) for key, rounds in each.items()} for name, each in found.items()}

    def copies(self, component: str) -> dict[int, Copy]:
        """Return the copies of a set-up, over all rounds, by size."""
        found: dict[int, list[Copy]] = {}
        for launch in self.launches:
            if launch.component == component:
                for copy in launch.copies:
                    found.setdefault(copy.size_bytes, []).append(copy)
        return {
            size: replace(rounds[0], seconds=Quantiles.across(each.seconds for each in rounds))
            for size, rounds in found.items()
        }


def bus_factor(operation: str, ranks: int) -> float:
    """Return by what a collective's bytes are multiplied for its bus bandwidth, so that ranks and operations compare.

    The factor is what an optimal algorithm sends from each rank, in units of the whole array.  It is the convention of
    NVIDIA's nccl-tests.
    """
    part = (ranks - 1) / ranks
    factors = {"allreduce": 2 * part, "broadcast": min(1.0, ranks - 1.0), "reduce_scatter": part, "allgather": part}
    return factors[operation]


def bus_bandwidth(operation: str, ranks: int, total_bytes: int, seconds: float) -> float:
    """Return a collective's bus bandwidth in bytes per second."""
    return bus_factor(operation, ranks) * total_bytes / seconds


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of ratios; NaN of none."""
    logarithms = [float(np.log(value)) for value in values]
    return float(np.exp(np.mean(logarithms))) if logarithms else float("nan")


def _merged(rounds: list[Measurement]) -> Measurement:
    """Join the rounds of one measurement; a rival counts that was there in all of them."""
    shared = [name for name in rounds[0].rivals if all(name in each.rivals for each in rounds)]
    rivals: Mapping[str, Rivalry] = {name: Rivalry.across(each.rivals[name] for each in rounds) for name in shared}
    return replace(rounds[0], seconds=Quantiles.across(each.seconds for each in rounds), rivals=dict(rivals))


def _parsed(kind: Any, text: bytes) -> Any:
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the text"
        raise InputError(
            "not what a benchmark writes", operation="benchmark results", got=f"{where}: {first['msg']}",
        ) from error  # fmt: skip
