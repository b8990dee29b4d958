"""The only reader of ``os.environ``: one function per fact, so that every variable that matters is found here."""

from __future__ import annotations

import os
from collections.abc import Iterable

_WORLD_SIZE = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_WORLD_RANK = ("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
DEVICE_TRANSPORT = "MPITRAIN_DEVICE_TRANSPORT"
"""For those who set it for a child process."""

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


def _first(names: Iterable[str]) -> tuple[str, str] | None:
    return next(((name, os.environ[name]) for name in names if os.environ.get(name)), None)


def launched_size() -> tuple[str, int] | None:
    """Return the variable and the number of ranks that the launcher says it started; None without a launcher.

    A launcher of its own (mpirun, mpiexec) is asked before Slurm, whose step may hold only the launcher's daemons.
    """
    found = _first(_WORLD_SIZE)
    return (found[0], int(found[1])) if found and found[1].isdigit() else None


def launched_rank() -> int | None:
    """Return this process's rank as the launcher says it; None without a launcher, or where it says nothing."""
    found = _first(_WORLD_RANK)
    return int(found[1]) if found and found[1].isdigit() else None


def launched_local_size() -> int | None:
    """Return how many ranks the launcher put on this node, where it says so before MPI starts."""
    found = _first(("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"))
    return int(found[1]) if found and found[1].isdigit() else None


def user_threads() -> tuple[str, str] | None:
    """Return the variable by which the user fixed the number of BLAS threads, and its value."""
    return _first(_THREADS)


def set_default(name: str, value: str) -> None:
    """Set an environment variable unless the user did; for what MPI reads when it starts."""
    os.environ.setdefault(name, value)


def snapshot() -> dict[str, str]:
    """Return a copy of the environment, for a child process."""
    return dict(os.environ)


def mpi_settings() -> dict[str, str]:
    """Return the variables by which a user or a module file steers an MPI library."""
    families = ("OMPI_MCA_", "OPAL_PREFIX", "I_MPI_", "MPI4PY_")
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(families)}


def temporary_directory() -> str:
    """Return where MPI libraries put temporary files, whether it exists or not."""
    return os.environ.get("TMPDIR") or "/tmp"


def cache_directory() -> str:
    """Return where programs keep what they can make again, by the XDG convention, whether it exists or not."""
    return os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")


def slurm_job() -> dict[str, str]:
    """Return the ``SLURM_*`` variables that identify a job, for the record of a run."""
    keys = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST")
    return {key: os.environ[key] for key in keys if key in os.environ}


def allocated_nodes() -> int:
    """Return how many nodes Slurm allocated to this job; 1 outside of one."""
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    return int(nodes) if nodes.isdigit() else 1


def debug() -> bool:
    """Tell whether ``MPITRAIN_DEBUG`` asks for every collective to be checked before it runs."""
    return os.environ.get("MPITRAIN_DEBUG", "0") not in ("", "0")


def timeout_s() -> str | None:
    """Return ``MPITRAIN_TIMEOUT_S``: how long a collective may wait, in seconds; None where it is not set."""
    return os.environ.get("MPITRAIN_TIMEOUT_S") or None


def transport() -> str | None:
    """Return ``MPITRAIN_TRANSPORT``: which transport to use whatever would be chosen; None where it is not set."""
    return os.environ.get("MPITRAIN_TRANSPORT") or None


def device_transport() -> str | None:
    """Return ``MPITRAIN_DEVICE_TRANSPORT``: how memory of devices moves whatever would be chosen; None if not set."""
    return os.environ.get(DEVICE_TRANSPORT) or None


def kernel() -> bool:
    """Tell whether compiled loops may be used where they were built."""
    return os.environ.get("MPITRAIN_KERNEL", "").lower() not in ("off", "0")


def ranks_per_node() -> str | None:
    """Return ``MPITRAIN_RANKS_PER_NODE``: how many ranks count as a node, to try several nodes on one machine."""
    return os.environ.get("MPITRAIN_RANKS_PER_NODE") or None


def tuning() -> bool:
    """Tell whether a tuning table in the cache may choose algorithms: not with ``MPITRAIN_TUNING=off``."""
    return os.environ.get("MPITRAIN_TUNING", "").lower() not in ("off", "0", "no", "false")
