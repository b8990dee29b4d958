"""How many threads BLAS may use on a rank, so that the ranks of a node share its CPUs instead of fighting for them."""

from __future__ import annotations

import os
from pathlib import Path

from threadpoolctl import threadpool_info, threadpool_limits

from mpitrain import _env
from mpitrain.comm.communicator import Communicator

_CGROUPS = Path("/sys/fs/cgroup")


def set_blas_threads(comm: Communicator, threads: int | None = None) -> int:
    """Give each rank its share of the node's CPUs, or so many, unless the user set a thread variable.

    Works after NumPy was imported too, since it calls the libraries instead of setting variables.

    Parameters
    ----------
    comm : Communicator
        All ranks of the job.
    threads : int, optional
        How many each rank gets; None: its share.

    Returns
    -------
    int
        Threads that BLAS now uses on this rank.

    Notes
    -----
    Collective.  To be called from the main thread: threadpoolctl lets one thread alone set OpenBLAS's number.
    """
    own = os.sched_getaffinity(0)
    everyones: list[set[int]] = comm.node.allgather_object(own)
    if _env.user_threads() is None:
        threadpool_limits(threads or share(own, everyones, cpu_quota()))
    return blas_threads()


def blas_threads() -> int:
    """Return how many threads BLAS uses in this process."""
    return max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)


def share(own: set[int], everyones: list[set[int]], quota: float | None) -> int:
    """Return the threads of one rank.

    Parameters
    ----------
    own : set of int
        CPUs that this rank may run on.
    everyones : list of set of int
        Those of each rank of the node.
    quota : float, optional
        CPUs' worth of time that the ranks of the node may use together.
    """
    cpus = len(set().union(*everyones))
    if quota is not None:
        cpus = min(cpus, int(quota))
    return max(1, min(len(own), cpus // len(everyones)))


def cpu_quota(root: Path = _CGROUPS) -> float | None:
    """Return the CPU time per time that this container may use, in CPUs; None without a limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        quota, period = _version_1(root / "cpu")
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _version_1(folder: Path) -> tuple[str, str]:
    try:
        return (
            (folder / "cpu.cfs_quota_us").read_text().strip(),
            (folder / "cpu.cfs_period_us").read_text().strip(),
        )
    except OSError:
        return "max", "1"
