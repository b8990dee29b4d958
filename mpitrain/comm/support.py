"""What the MPI library that has started can do, as it says itself."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass


@dataclass(frozen=True)
class Support:
    """Properties of a running MPI library.

    Parameters
    ----------
    standard : str
        Version of the MPI standard, e.g. ``4.0``.
    threads : str
        The thread level that it granted: ``single``, ``funneled``, ``serialized`` or ``multiple``.
    cuda_aware : bool or None
        Whether it takes device memory; None where it cannot be asked.
    """

    standard: str
    threads: str
    cuda_aware: bool | None


def support() -> Support:
    """Return what the MPI library can do; MPI must have been started, by `mpitrain.comm.world`."""
    from mpi4py import MPI

    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    standard = ".".join(map(str, MPI.Get_version()))
    return Support(standard, levels[MPI.Query_thread()], _cuda_aware(MPI.__file__))


def _cuda_aware(extension: str) -> bool | None:
    """Ask the extension of Open MPI's and MPICH's; a look-up in mpi4py's module also searches the library."""
    query = getattr(ctypes.CDLL(extension), "MPIX_Query_cuda_support", None)
    return None if query is None else bool(query())
