"""What the ranks of a launch tell of themselves: where each runs, on which CPUs, with which versions."""

from __future__ import annotations

import os
import platform
import socket
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from mpitrain import _env
from mpitrain._errors import MpitrainError
from mpitrain.comm import Communicator, abort_on_uncaught, tuning, world
from mpitrain.comm.threads import blas_threads, cpu_quota, share
from mpitrain.comm.tuning import Found


@dataclass(frozen=True)
class Rank:
    """One rank.

    Parameters
    ----------
    node : int
        The first world rank of its node: hosts may share a name.
    host : str
        Name of its node.
    cpus : frozenset of int
        CPUs that it may run on.
    cpus_there : int
        CPUs of the node.
    quota : float or None
        CPUs' worth of time that the ranks of the node may use together.
    threads : int
        Threads of its BLAS.
    fixed : str
        ``VARIABLE=value`` by which the user fixed them; empty if mpitrain chose.
    shared : (int, int) or None
        Size and free space of ``/dev/shm`` in bytes.
    versions : dict
        What must be the same on all ranks.
    """

    node: int
    host: str
    cpus: frozenset[int]
    cpus_there: int
    quota: float | None
    threads: int
    fixed: str
    shared: tuple[int, int] | None
    versions: dict[str, str]


@dataclass
class Survey:
    """The ranks of this launch.

    Parameters
    ----------
    ranks : list of Rank
        All of them; this process alone if no launcher started it.
    comm : Communicator or None
        Their world; None without a launcher.
    problem : MpitrainError or None
        Why they form no world, though a launcher started them.
    transport : (str, str) or None
        What reduces large arrays on these ranks, and why; without a launcher, on those that `launch` tried.
    tuning : Found or None
        What the cache holds for these ranks; None without a launcher.
    """

    ranks: list[Rank]
    comm: Communicator | None = None
    problem: MpitrainError | None = None
    transport: tuple[str, str] | None = None
    tuning: Found | None = None

    @property
    def nodes(self) -> list[list[Rank]]:
        """The ranks of each node."""
        nodes: dict[int, list[Rank]] = defaultdict(list)
        for rank in self.ranks:
            nodes[rank.node].append(rank)
        return list(nodes.values())


def usable_cpus(node: list[Rank]) -> int:
    """Return how many CPUs the ranks of a node share: what they are bound to, within the container's quota."""
    bound = len(frozenset().union(*(rank.cpus for rank in node)))
    quota = node[0].quota
    return bound if quota is None else max(1, min(bound, int(quota)))


def take() -> Survey:
    """Ask all ranks.  Collective under a launcher, where MPI starts; without one, MPI stays as it is."""
    problem = None
    if _env.launched_size() is not None:
        try:
            comm = world()
        except MpitrainError as error:
            problem = error
        else:
            abort_on_uncaught(comm)
            transport = (comm.transport, comm.transport_reason)
            found = tuning.load(comm, tuning.chosen_transport())
            return Survey(_everyone(comm), comm, transport=transport, tuning=found)
    return Survey([_alone()], problem=problem)


def _everyone(comm: Communicator) -> list[Rank]:
    node = int(comm.node.allreduce(comm.rank, "min"))
    everyone: list[Rank] = comm.allgather_object(_this(node, blas_threads(), comm.library))
    return everyone


def _alone() -> Rank:
    """Describe this process as the one rank that it would be: `world` sets the threads, and is not called here."""
    cpus = os.sched_getaffinity(0)
    return _this(0, blas_threads() if _env.user_threads() else share(cpus, [cpus], cpu_quota()), "")


def _this(node: int, threads: int, mpi_library: str) -> Rank:
    return Rank(
        node=node,
        host=socket.gethostname(),
        cpus=frozenset(os.sched_getaffinity(0)),
        cpus_there=os.cpu_count() or 1,
        quota=cpu_quota(),
        threads=threads,
        fixed="=".join(_env.user_threads() or ()),
        shared=_shared_memory(),
        versions=_versions() | {"MPI library": mpi_library},
    )


def _shared_memory() -> tuple[int, int] | None:
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("mpitrain", "numpy", "mpi4py"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
