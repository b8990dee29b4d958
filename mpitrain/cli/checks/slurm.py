"""Whether this is a Slurm allocation, and whether ``srun`` can start ranks of this MPI library."""

from __future__ import annotations

import re
import shutil
import subprocess

from mpitrain import _env
from mpitrain.cli.checks.finding import Finding, ok, warn
from mpitrain.cli.checks.mpi import NAMES
from mpitrain.comm.launch import library

_PLUGINS = {"openmpi": ("pmix",), "mpich": ("pmi2", "cray_shasta"), "intelmpi": ("pmi2",)}
"""What ``srun --mpi=`` must be told, by MPI library; with any other, each rank is a world of its own, or aborts."""

_TIMEOUT_S = 10.0


def allocation() -> Finding:
    """Whether this runs in a job."""
    job = _env.slurm_job()
    if "SLURM_JOB_ID" in job:
        return ok(f"in job {job['SLURM_JOB_ID']} on {job.get('SLURM_JOB_NODELIST', 'one node')}")
    return ok("not in a job" if shutil.which("srun") else "not installed")


def plugin() -> Finding | None:
    """Whether ``srun`` has the plugin that the MPI library needs."""
    program = shutil.which("srun")
    if program is None:
        return None
    done = subprocess.run(
        [program, "--mpi=list"], check=False, capture_output=True, text=True, timeout=_TIMEOUT_S
    )  # fmt: skip
    said = done.stdout + done.stderr  # older releases list the plugins as an error
    if done.returncode != 0:
        line = (said.strip().splitlines() or ["no message"])[0]
        return warn(
            f"srun --mpi=list failed: {line}", "this machine is not set up for Slurm: start with mpitrain run -n"
        )
    return _fit(set(re.findall(r"\b(?:pmix|pmi2|cray_shasta|none)\b", said)), library().kind)


def _fit(plugins: set[str], kind: str) -> Finding:
    listed = ", ".join(sorted(plugins))
    wanted = _PLUGINS.get(kind, ())
    for name in wanted:
        if name in plugins:
            return ok(f"srun --mpi={name} fits {NAMES[kind]} (there are: {listed})")
    return warn(
        f"srun has no plugin for {NAMES[kind]}: wanted {' or '.join(wanted) or 'unknown'}, there are {listed}",
        "in an allocation, start with mpirun (mpitrain run -n N) instead of srun",
    )
