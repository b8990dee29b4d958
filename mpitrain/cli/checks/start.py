"""Whether MPI starts, and whether ranks that are started together see each other: tried, not guessed."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from mpitrain import _env
from mpitrain.cli.checks.finding import Finding, fail, ok, warn
from mpitrain.cli.checks.survey import Survey
from mpitrain.cli.checks.world import plural
from mpitrain.cli.limited import Ended, run_limited
from mpitrain.comm.launch import launch_command
from mpitrain.comm.support import support

LIMIT_S = 30.0
_RANKS = 2
_EARLIER_S = 5.0
"""Ranks end by themselves so much before the limit, to tell where they hung."""


@dataclass(frozen=True)
class Trial(Ended):
    """What came of starting ranks."""

    @property
    def worlds(self) -> list[dict[str, Any]]:
        """What rank 0 of each world printed."""
        return [json.loads(line) for line in self.output.splitlines() if line.startswith('{"size"')]


def keep(ended: Ended) -> Path:
    """Write what a command printed to a file that stays."""
    with tempfile.NamedTemporaryFile(
        "w", errors="replace", prefix="mpitrain-doctor-", suffix=".log", delete=False
    ) as log:
        log.write(ended.output)
    return Path(log.name)


def try_ranks(ranks: int | None, limit_s: float = LIMIT_S) -> Trial:
    """Start the smallest MPI job on ``ranks`` ranks, or as one process without a launcher, and wait for its end."""
    rank = [sys.executable, "-m", "mpitrain.comm.trial", str(max(limit_s - _EARLIER_S, limit_s / 2))]
    argv, env = (rank, _env.snapshot()) if ranks is None else launch_command(ranks, rank)
    return Trial(*astuple(run_limited(argv, env, limit_s)))


def start(survey: Survey) -> Finding | None:
    """Whether MPI starts in one process, and what it can do."""
    if survey.problem is not None:
        return None  # `launch` tells
    if survey.comm is not None:
        can = support()
        return _able(can.standard, can.threads, can.cuda_aware)
    trial = try_ranks(None)
    if trial.code == 0 and trial.worlds:
        world = trial.worlds[0]
        return _able(world["standard"], world["threads"], world["cuda_aware"])
    return fail(f"MPI does not start: {trial.ending}", f"read {keep(trial)}")


def _able(standard: str, threads: str, cuda_aware: bool | None) -> Finding:
    memory = {True: "host and CUDA memory", False: "host memory", None: "host memory, CUDA unknown"}[cuda_aware]
    text = f"MPI {standard}, thread level {threads}, {memory}"
    if threads in ("multiple", "serialized"):
        return ok(text)
    return warn(text, "take an MPI library with thread support: threads of a rank cannot call this one")


def launch(survey: Survey) -> Finding:
    """Whether ranks that are started together form one world."""
    if survey.problem is not None:
        return fail(str(survey.problem))
    if survey.comm is not None:
        return _launched(survey.comm.size)
    trial = try_ranks(_RANKS)
    survey.transport = _transport(trial)
    worlds = [(world["size"], world["total"]) for world in trial.worlds]
    if trial.code == 0 and worlds == [(_RANKS, _RANKS * (_RANKS + 1) // 2)]:
        return ok(f"mpiexec -n {_RANKS}: one world of {_RANKS}, in {trial.seconds:.1f} s")
    if len(worlds) > 1:
        problem, remedy = f"{len(worlds)} worlds of one rank", "install one MPI library and its own mpiexec; "
    else:
        problem, remedy = trial.ending, ""
    return fail(f"mpiexec -n {_RANKS}: {problem}", f"{remedy}read {keep(trial)}")


def _transport(trial: Trial) -> tuple[str, str] | None:
    """Return what would reduce large arrays on ranks that were tried, and why."""
    first = next(iter(trial.worlds), {})
    return (first["transport"], first["why"]) if "transport" in first else None


def _launched(size: int) -> Finding:
    """Compare the world with what the launcher says."""
    variable, expected = _env.launched_size() or ("", size)
    text = f"{variable}={expected}, one world of {plural(size, 'rank')}"
    if expected == size:
        return ok(text)
    return warn(text, f"unset {variable} if it is left from a launcher further out; else some ranks stand apart")
