"""How memory of GPUs moves between ranks, and which ways may be trusted: tried, not guessed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from mpitrain import _env
from mpitrain._errors import MissingExtraError
from mpitrain.arrays.gpus import find_gpus
from mpitrain.cli.checks.finding import Finding, ok, warn
from mpitrain.cli.checks.start import keep
from mpitrain.cli.checks.survey import Survey
from mpitrain.cli.limited import Ended, run_limited
from mpitrain.comm import probing
from mpitrain.comm.launch import launch_command, library
from mpitrain.comm.transports.cuda_aware import CudaAwareTransport
from mpitrain.comm.transports.device_choice import choose
from mpitrain.comm.transports.ipc import IpcTransport
from mpitrain.comm.transports.nccl import NcclTransport

LIMIT_S = 60.0
"""For each job: CuPy compiles its kernels at their first use."""

_RANKS = 2
_EARLIER_S = 5.0
_STEPS = {
    NcclTransport.name: ("broadcast", "allreduce"),
    IpcTransport.name: ("broadcast", "allreduce"),
    CudaAwareTransport.name: ("send", "broadcast", "allreduce"),
}
_PROGRAM = (sys.executable, "-m", "mpitrain.comm.probing.program")
_REMEDY = "docs/gpu.md tells what they need"


def transport() -> Finding:
    """How arrays travel."""
    way = choose(library().version)
    return ok(f"host memory by MPI or by shared memory; memory of GPUs {way.name} ({way.why})")


def probe(survey: Survey) -> Finding:
    """Whether ranks may read each other's GPUs, and MPI takes their memory: tried in jobs, and the verdict kept."""
    if survey.comm is not None or survey.problem is not None:
        return warn("not probed: ranks start no ranks", "mpitrain doctor --probe-gpu, without mpirun or srun")
    obstacle = _obstacle()
    if obstacle:
        return ok(f"not probed, and nothing kept: {obstacle}")
    return judge(_PROGRAM)


def judge(program: Sequence[str], limit_s: float = LIMIT_S) -> Finding:
    """Try each step of each transport until one fails, and keep the verdict.

    Parameters
    ----------
    program : sequence of str
        What each rank runs, followed by the step and a limit in seconds.
    limit_s : float
        For each job.
    """
    problems, outputs = dict.fromkeys(_STEPS, ""), list[str]()
    for transport, steps in _STEPS.items():
        for step in steps:
            ended = _try(program, transport, step, limit_s)
            problem = _problem(ended, transport, step)
            if problem:
                problems[transport] = f"{step}: {problem}"
                outputs.append(str(keep(ended)))
                break
    verdict = probing.Verdict.now(probing.setting(library().version), problems)
    told = f"{verdict}; kept in {probing.save(verdict)}" + "".join(f"; read {path}" for path in outputs)
    return ok(told) if verdict.right else warn(f"memory of GPUs is staged: {told}", _REMEDY)


def _obstacle() -> str:
    """Return why there is nothing to probe; empty if there is."""
    try:
        found = find_gpus()
    except MissingExtraError:
        return "CuPy is not installed"
    return "" if found.names else f"CuPy {found.cupy} sees no GPU"


def _try(program: Sequence[str], transport: str, step: str, limit_s: float) -> Ended:
    argv, env = launch_command(_RANKS, [*program, step, str(max(limit_s - _EARLIER_S, limit_s / 2))])
    return run_limited(argv, env | {_env.DEVICE_TRANSPORT: transport}, limit_s)


def _problem(ended: Ended, transport: str, step: str) -> str:
    """Return what was wrong with a job; empty if nothing was."""
    told = [json.loads(line) for line in ended.output.splitlines() if line.startswith('{"step"')]
    if ended.code == 0 and told == [{"step": step, "transport": transport, "problem": ""}]:
        return ""
    found = next((each["problem"] for each in told if each["problem"]), "")
    return found or (ended.ending if ended.code != 0 else "the ranks formed no world")
