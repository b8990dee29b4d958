"""What every rank of a launch does: race each of our variants with the rivals, and tell what came of it.

As ``python -m mpitrain.comm.bench.ranks SPEC RESULT SECONDS`` it is a launch of a campaign of ``mpitrain bench``: the
task is read from a file, rank 0 writes the result to another, and ranks that take too long end by themselves.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain._errors import CommunicationError, MissingExtraError, MpitrainError
from mpitrain._typing import Array
from mpitrain.arrays import plain
from mpitrain.comm.bench.cases import VARIANTS, Contender, Variant, correct
from mpitrain.comm.bench.components import DEFAULT
from mpitrain.comm.bench.ground import Bind, Ground, Stage, buffers_for
from mpitrain.comm.bench.meeting import meet
from mpitrain.comm.bench.results import Copy, Launch, Measurement, Quantiles, Rivalry
from mpitrain.comm.bench.spec import Spec
from mpitrain.comm.guard import abort_on_uncaught
from mpitrain.comm.machine import cpu_model, last_level_cache_bytes
from mpitrain.comm.start import world
from mpitrain.comm.timing import Trial, race
from mpitrain.comm.transports.choice import ranks_per_node
from mpitrain.comm.transports.host import HostTransport

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

MAIN = "mpi4py"
"""The rival of all variants; others meet the leading ones."""

_TRIALS, _FEWEST, _MOST = 3, 11, 2000
"""Turns that are not counted, and how many are, at least and at most, where a race is given a time."""

_CALLS_UNTIL_RESIDENT = 3
"""Calls in a row after which arrays lie in the last cache, if they fit.

One that only takes what other caches discard may not do so before they have seen a line twice: an Intel Xeon took 360,
277, 187 and from then on 175 µs for 4 MiB."""


def measure(comm: Communicator, spec: Spec) -> Launch:
    """Measure what a task asks for.

    Parameters
    ----------
    comm : Communicator
        The world's.
    spec : Spec
        The same on all ranks.

    Returns
    -------
    Launch
        The same on all ranks, but for ``about``, which is rank 0's view.

    Raises
    ------
    CommunicationError
        One of our variants gave a wrong result.

    Notes
    -----
    Collective.
    """
    with _rivals(comm, spec) as (rivals, notes):
        stage = Stage(comm)
        bench = Bench(stage, spec, rivals, notes)
        copies = [bench.copy(size) for size in spec.sizes_bytes]
        measurements = [
            measured for operation in spec.operations for size in spec.sizes_bytes
            for measured in bench.size(operation, size)
        ]  # fmt: skip
        about = _about(comm, spec, stage.transports)
        stage.free()
    return Launch(spec.component, spec.round, about, copies, measurements, list(dict.fromkeys(notes)))


class Bench:
    """A launch under way: what all its races share.

    Parameters
    ----------
    stage : Stage
        The communicators.
    spec : Spec
        The task.
    rivals : dict of str to callable
        By name; `MAIN` races with every variant, others with the leading ones.
    notes : list of str
        Takes what was left out.
    """

    def __init__(self, stage: Stage, spec: Spec, rivals: dict[str, Bind], notes: list[str]) -> None:
        self._stage, self._spec, self._rivals, self._notes = stage, spec, rivals, notes
        self._comm = stage.world
        self._cache_bytes = int(self._comm.allreduce(last_level_cache_bytes(), "max"))

    def copy(self, size_bytes: int) -> Copy:
        """Let all ranks copy arrays at once."""
        buffers = self._buffers(size_bytes)
        ground = self._ground("broadcast", size_bytes)
        seconds = self._timed([ground.copies()])
        return Copy(size_bytes, buffers, Quantiles.of(seconds[:, 0]))

    def size(self, operation: str, size_bytes: int) -> Iterator[Measurement]:
        """Yield the measurements of an operation at a size."""
        ground = self._ground(operation, size_bytes)
        for variant in chosen(self._spec):
            if variant.operation == operation:
                for transport in self._transports(variant):
                    yield self._duel(ground, variant, transport, size_bytes)

    def _transports(self, variant: Variant) -> list[str]:
        """Return those on which a variant is raced: on ``host``, another set-up of the library would meet itself."""
        found = [transport for transport in variant.transports if transport in self._stage.transports]
        if self._spec.component == DEFAULT.name:
            return found
        return [transport for transport in found if transport != HostTransport.name] or found

    def _duel(self, ground: Ground, variant: Variant, transport: str, size_bytes: int) -> Measurement:
        """Race one variant with each rival in turn."""
        ours = ground.ours(variant, self._stage.comm(variant, transport))
        self._demand(ground, ours, variant)
        self._demand(ground, ours, variant)  # arrays that were met before are known by then
        times, rivals = {}, {}
        for name in self._rivals:
            if name == MAIN or variant.leading:
                rival = self._rival(ground, name, variant)
                if rival is not None:
                    times[name] = self._race(ours, rival, size_bytes)
                    rivals[name] = Rivalry.of(times[name][:, 1], times[name][:, 0])
        alone = times.get(MAIN)
        if alone is None:  # the library cannot do this, or does it wrong
            alone = self._timed([ours.calls])
        self._demand(ground, ours, variant)
        return Measurement(
            ground.operation, variant.name, transport, size_bytes, ground.total_bytes, Quantiles.of(alone[:, 0]), rivals
        )

    def _race(self, ours: Contender, rival: Contender, size_bytes: int) -> Array:
        """Race two, with nobody else between them: others would cool the caches.

        So would the rival.  Where buffers are resident, each turn follows calls of its own, as in a loop.
        """
        values = [0 if each.overwrites else self._comm.rank + 1 for each in (ours, rival)]
        for contender, value in zip((ours, rival), values, strict=True):
            _fill(contender, value)
        _settle_pages()
        calls = [ours.calls, rival.calls]
        if self._spec.buffers != "rewritten":
            return self._timed(calls, self._loops(calls, size_bytes) if self._spec.buffers == "resident" else None)
        writes = [
            [partial(array.fill, value) for array in each.inputs]
            for each, value in zip((ours, rival), values, strict=True)
        ]
        return self._timed(calls, writes)

    def _loops(self, calls: list[list[Any]], size_bytes: int) -> list[list[Any]]:
        """Return what repeats each call until what fits into the last cache lies there."""
        fits = size_bytes * self._comm.size <= self._cache_bytes
        return [[partial(_repeat, call, _CALLS_UNTIL_RESIDENT if fits else 1) for call in each] for each in calls]

    def _rival(self, ground: Ground, name: str, variant: Variant) -> Contender | None:
        """Return a rival that is able to do this, and does it right."""
        make = ground.rival if name == MAIN else ground.always_in_place
        contender = make(name, self._rivals[name], variant)
        if self._right(ground, contender):
            return contender
        self._notes.append(f"{name}: no {ground.operation} of {ground.dtype}, or a wrong one; left out")
        return None

    def _demand(self, ground: Ground, ours: Contender, variant: Variant) -> None:
        """Raise a CommunicationError unless our results are right."""
        if not self._right(ground, ours):
            raise CommunicationError(
                f"{variant.name} gave a wrong result", operation=ground.operation, got=f"{ground.total_bytes} bytes",
                remedy="report it as a bug of mpitrain's",
            )  # fmt: skip

    def _right(self, ground: Ground, contender: Contender) -> bool:
        """Tell whether a contender's calls give the right results on all ranks."""
        rank, ranks, first = self._comm.rank, self._comm.size, ground.first
        for array in contender.outputs:
            array.fill(0)  # what another contender wrote is no result of this one's
        for array in contender.inputs:
            np.multiply(first, rank + 1, out=array.reshape(first.shape))
        try:
            found = list(contender.results())  # all of them: a rank that left out some would be missed by the others
            right = all(correct(ground.operation, rank, ranks, first, each) for each in found)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, MpitrainError):
                raise
            right = False
        return bool(self._comm.allreduce(int(right), "min"))

    def _timed(self, contenders: list[list[Any]], before: list[list[Any]] | None = None) -> Array:
        """Race after a few turns that are not counted, which also tell how many turns the time allows."""
        trials = [self._wall_s(contenders, before) for _ in range(_TRIALS)]
        repeats = self._spec.repeats
        if repeats is None:
            turn_s = float(self._comm.allreduce(float(np.median(trials)), "max"))
            repeats = int(np.clip(self._spec.time_s / turn_s, _FEWEST, _MOST))
        return race(self._comm, contenders, repeats, before)

    def _wall_s(self, contenders: list[list[Any]], before: list[list[Any]] | None) -> float:
        """Return how long one turn of each takes, with all that is done in between."""
        start = time.perf_counter()
        race(self._comm, contenders, 1, before)
        return time.perf_counter() - start

    def _ground(self, operation: str, size_bytes: int) -> Ground:
        elements = max(1, size_bytes // np.dtype(self._spec.dtype).itemsize)
        return Ground(operation, elements, self._spec.dtype, self._comm.size, self._buffers(size_bytes))

    def _buffers(self, size_bytes: int) -> int:
        return buffers_for(self._spec.buffers, size_bytes, self._cache_bytes)


def chosen(spec: Spec) -> list[Variant]:
    """Return the variants that a task is about."""
    return [
        each for each in VARIANTS
        if each.operation in spec.operations
        and (each.leading or not spec.leading)
        and (not spec.variants or each.name in spec.variants)
    ]  # fmt: skip


def _repeat(call: Trial, times: int) -> None:
    for _ in range(times):
        call()


def _fill(contender: Contender, value: int) -> None:
    for array in contender.inputs:
        array[...] = value


@contextmanager
def _rivals(comm: Communicator, spec: Spec) -> Iterator[tuple[dict[str, Bind], list[str]]]:
    """Yield the rivals of this launch by name, and a list for notes, which says who is missing."""
    from mpitrain.comm.bench import gloo, rivals

    found: dict[str, Bind] = {MAIN: rivals.bind}
    if not spec.gloo:
        yield found, []
        return
    try:
        gloo.check()
        problem = None
    except MissingExtraError as error:
        problem = str(error)
    problem = next(filter(None, comm.allgather_object(problem)), None)
    if problem is not None:
        yield found, [f"gloo left out: {problem}"]
        return
    place = meet(comm)
    if place is None:
        yield found, ["gloo left out: no IPv4 address of rank 0's node can be reached from all ranks"]
        return
    with gloo.group(comm, place) as bind:
        yield found | {gloo.NAME: bind}, []


def _about(comm: Communicator, spec: Spec, transports: tuple[str, ...]) -> dict[str, Any]:
    """Describe what was measured on what.  Collective."""
    from mpitrain.comm.bench.rivals import DATATYPES

    nodes = [len(list(ranks)) for _, ranks in groupby(sorted(map(int, comm.allgather(_first_of_node(comm)))))]
    return {
        "ranks": comm.size,
        "ranks_of_nodes": nodes,
        "ranks_per_node": ranks_per_node(),
        "machine": {
            "cpu": cpu_model(),
            "cpus": os.cpu_count(),
            "cpus_of_rank_0": len(os.sched_getaffinity(0)),
            "last_level_cache_bytes": last_level_cache_bytes(),
        },
        "versions": {"python": platform.python_version(), **versions()},
        "mpi_library": comm.library,
        "transports": list(transports),
        "tuning": comm.tuning.describe() if comm.tuning else [],
        "dtype": spec.dtype,
        "mpi_datatype": DATATYPES[spec.dtype].Get_name(),
        "buffers": spec.buffers,
        "repeats": spec.repeats,
        "time_s": spec.time_s,
        "command": list(spec.command),
    }


def _first_of_node(comm: Communicator) -> int:
    return int(comm.node.broadcast(comm.rank))


def versions() -> dict[str, str]:
    """Return the versions of this package and of those that a benchmark depends on, as far as they are there."""
    found = {}
    for name in ("mpitrain", "numpy", "mpi4py", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _settle_pages() -> None:
    """Map and unmap some memory, so that no array's pages are among those that this CPU has mapped last.

    Linux keeps these in a list apart until it is full, and to find one there takes 0.2 µs whenever another process
    reads it: 3 of 25 µs in a sum of 64 KiB by the library, on whichever array happened to be mapped last.
    """
    plain(1 << 18, np.dtype(np.uint8)).fill(1)


def main(spec: str, result: str, limit_s: str) -> None:
    """Measure a task that rank 0 reads, and let it write the result; other nodes need not have these files."""
    faulthandler.dump_traceback_later(float(limit_s), exit=True)  # leaves no rank behind
    comm = world()
    abort_on_uncaught(comm)
    task = Spec.from_json(comm.broadcast_object(Path(spec).read_bytes() if comm.rank == 0 else b""))
    launch = measure(comm, task)
    if comm.rank == 0:
        partial_file = Path(f"{result}.part")
        partial_file.write_bytes(launch.to_json())
        partial_file.replace(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
