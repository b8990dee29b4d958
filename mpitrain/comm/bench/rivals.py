"""The MPI library's collectives, called through mpi4py's buffer methods with nothing around; importing this starts MPI.

Datatypes and buffers are spelt out beforehand, as those do who want mpi4py at its fastest.
"""

from __future__ import annotations

from functools import partial

from mpi4py import MPI

from mpitrain._typing import Array
from mpitrain.comm.bench.cases import Call

DATATYPES = {"float32": MPI.FLOAT, "float64": MPI.DOUBLE, "int32": MPI.INT32_T, "int64": MPI.INT64_T}


def bind(operation: str, x: Array, y: Array, in_place: bool) -> Call:
    """Return a call over all ranks of the job.

    Parameters
    ----------
    operation : str
        E.g. ``allreduce``.
    x, y : array, C-contiguous
        What this rank hands in, and where the result goes.
    in_place : bool
        The result replaces ``x`` (allreduce only; a broadcast always does so).
    """
    comm = MPI.COMM_WORLD
    send, recv = ([array, DATATYPES[array.dtype.name]] for array in (x, y))
    match operation:
        case "allreduce" if in_place:
            return partial(comm.Allreduce, MPI.IN_PLACE, send, MPI.SUM)
        case "allreduce":
            return partial(comm.Allreduce, send, recv, MPI.SUM)
        case "broadcast":
            return partial(comm.Bcast, send, 0)
        case "reduce_scatter":
            return partial(comm.Reduce_scatter_block, send, recv, MPI.SUM)
        case _:
            return partial(comm.Allgather, send, recv)
