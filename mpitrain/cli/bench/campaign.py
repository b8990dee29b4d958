"""A sequence of launches: every set-up of the MPI library in turn, round after round; one that fails is left out."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from mpitrain._errors import InputError
from mpitrain.cli.limited import run_limited
from mpitrain.comm.bench.components import DEFAULT, VERBOSE, Component, disabled
from mpitrain.comm.bench.ranks import chosen
from mpitrain.comm.bench.results import Launch
from mpitrain.comm.bench.spec import Spec

_PROBE_LIMIT_S = 40.0
_EARLIER_S = 5.0
"""Ranks end by themselves so much before the limit, to tell where they hung."""


@dataclass(frozen=True)
class Failed:
    """A launch that measured nothing.

    Parameters
    ----------
    why : str
        In a few words.
    """

    why: str


Start: TypeAlias = Callable[[Sequence[str]], tuple[list[str], dict[str, str]]]
"""From what each rank runs to the command line that starts all of them, and its environment."""

Launcher: TypeAlias = Callable[[Component, int], Launch | Failed]
"""Launches ranks with a set-up, in a round, and returns what they measured."""


def run_campaign(
    components: Sequence[Component], rounds: int, launch: Launcher, tell: Callable[[str], object] = lambda text: None
) -> tuple[list[Launch], list[str]]:
    """Launch all set-ups in every round.

    Parameters
    ----------
    components : sequence of Component
        In this order.
    rounds : int
        How often, so that hours of the day and placement of pages differ.
    launch : callable
        What launches; a set-up whose launch failed is not launched again.
    tell : callable
        Told of each launch before it starts.

    Returns
    -------
    launches : list of Launch
        Those that came to an end.
    failures : list of str
        A line for each set-up that was given up.
    """
    launches, failures = [], {}
    for number in range(1, rounds + 1):
        for component in components:
            if component.name in failures:
                continue
            tell(f"round {number} of {rounds}: {component.name}")
            found = launch(component, number)
            if isinstance(found, Launch):
                launches.append(found)
            else:
                failures[component.name] = f"{component.name}: {found.why}; skipped"
    return launches, list(failures.values())


def launcher(start: Start, spec: Spec, limit_s: float) -> Launcher:
    """Return what launches ranks, each time for ``limit_s`` seconds at most."""

    def launch(component: Component, number: int) -> Launch | Failed:
        wanted = task(spec, component, number)
        if not chosen(wanted):
            return Failed(f"performs {', '.join(component.operations)} only, of which nothing was chosen to compare")
        why = _probe(component, start) if number == 1 else None
        return Failed(why) if why is not None else _measured(component, start, wanted, limit_s)

    return launch


def task(spec: Spec, component: Component, number: int) -> Spec:
    """Return what a launch with a set-up measures: what that performs, and beside the default our leading ways only."""
    operations = tuple(operation for operation in spec.operations if operation in component.operations)
    own = component == DEFAULT
    return replace(
        spec, operations=operations, component=component.name, round=number, leading=spec.leading or not own,
        gloo=spec.gloo and own,
    )  # fmt: skip


def _probe(component: Component, start: Start) -> str | None:
    """Return why a set-up takes no effect on these ranks; None if it does, or nobody can tell."""
    if not component.needs:
        return None
    argv, env = start([sys.executable, "-m", "mpitrain.comm.trial", str(_PROBE_LIMIT_S - _EARLIER_S)])
    ended = run_limited(argv, {**env, **component.settings, **VERBOSE}, _PROBE_LIMIT_S)
    return disabled(component, ended.output) if ended.code == 0 else f"ranks do not start: {ended.ending}"


def _measured(component: Component, start: Start, spec: Spec, limit_s: float) -> Launch | Failed:
    with tempfile.TemporaryDirectory(prefix="mpitrain-bench-") as folder:
        wanted, result = Path(folder) / "task.json", Path(folder) / "result.json"
        wanted.write_bytes(spec.to_json())
        rank = ["-m", "mpitrain.comm.bench.ranks", str(wanted), str(result), str(max(limit_s - _EARLIER_S, 1.0))]
        argv, env = start([sys.executable, *rank])
        ended = run_limited(argv, {**env, **component.settings}, limit_s)
        if ended.code != 0:
            return Failed(ended.ending)
        try:
            return Launch.from_json(result.read_bytes())
        except (OSError, InputError) as error:
            return Failed(f"no result: {error}")
