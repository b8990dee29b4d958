"""What a run ran on, for the record: versions, ranks, nodes, processors, BLAS, git commit, command line."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import threadpoolctl

from mpitrain import _env
from mpitrain.comm import Communicator
from mpitrain.comm.machine import cpu_model

_PACKAGES = ("mpitrain", "numpy", "mpi4py", "sklearn", "cupy", "torch", "jax", "ml_dtypes")
_GIT_TIMEOUT_S = 5.0


def describe_environment(comm: Communicator, mpi_library: str = "") -> dict[str, Any]:
    """Return what goes into ``environment.json``: JSON values, the same on all ranks.

    Parameters
    ----------
    comm : Communicator
        All ranks of the run.
    mpi_library : str
        What the MPI library calls itself; empty where there is none.

    Notes
    -----
    Collective over ``comm``: one allgather of a small object.  What is not per node is as rank 0 sees it.
    """
    run = _run(mpi_library) if comm.rank == 0 else {}
    gathered = comm.allgather_object((run, _node()))
    nodes: dict[str, dict[str, Any]] = {}
    for rank, (_, node) in enumerate(gathered):
        nodes.setdefault(node["host"], node | {"ranks": []})["ranks"].append(rank)
    return {**gathered[0][0], "ranks": comm.size, "nodes": list(nodes.values())}


def _run(mpi_library: str) -> dict[str, Any]:
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "directory": str(Path.cwd()),
        "git_commit": _git_commit(),
        "system": platform.platform(),
        "mpi_library": mpi_library,
        "versions": _versions(),
        "slurm": _env.slurm_job(),
    }


def _node() -> dict[str, Any]:
    """Describe what this rank runs on; of the ranks of a node, the first one's description is kept."""
    return {
        "host": socket.gethostname(),
        "cpu": cpu_model(),
        "cpus_per_rank": len(os.sched_getaffinity(0)),
        "threads_set": "=".join(_env.user_threads() or ()),
        "blas": [
            {"library": pool["internal_api"], "version": pool["version"], "threads": pool["num_threads"]}
            for pool in threadpoolctl.threadpool_info()
            if pool["user_api"] == "blas"
        ],
    }


def _versions() -> dict[str, str]:
    """Return the versions of Python and of those packages that are in use: none is imported for this."""
    used = {name: sys.modules[name] for name in _PACKAGES if name in sys.modules}
    packages = {name: str(getattr(module, "__version__", "unknown")) for name, module in used.items()}
    return {"python": platform.python_version(), **packages}


def _git_commit() -> str | None:
    """Return the commit of the working directory; None where it is in no repository, or git is not installed."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
