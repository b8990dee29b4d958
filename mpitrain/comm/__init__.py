"""Ranks and what they exchange.  Importing this starts no MPI and needs none installed."""

from typing import TYPE_CHECKING, Any

from mpitrain.comm.communicator import Communicator
from mpitrain.comm.guard import abort_on_uncaught, agree
from mpitrain.comm.lanes import LaneSum, lane_reduce_scatter, lane_sum
from mpitrain.comm.leave import leave_together
from mpitrain.comm.ledger import Count, Ledger
from mpitrain.comm.local import LocalWorld
from mpitrain.comm.mesh import Grid, ProcessMesh
from mpitrain.comm.request import Request
from mpitrain.comm.start import world
from mpitrain.comm.tasks import Outcome, map_tasks
from mpitrain.comm.tracing import trace

if TYPE_CHECKING:
    from mpitrain.comm.mpi import MpiCommunicator

__all__ = [
    "Communicator",
    "Count",
    "Grid",
    "LaneSum",
    "Ledger",
    "LocalWorld",
    "MpiCommunicator",
    "Outcome",
    "ProcessMesh",
    "Request",
    "abort_on_uncaught",
    "agree",
    "lane_reduce_scatter",
    "lane_sum",
    "leave_together",
    "map_tasks",
    "trace",
    "world",
]


def __getattr__(name: str) -> Any:
    if name == "MpiCommunicator":  # the import starts MPI
        from mpitrain.comm.mpi import MpiCommunicator

        return MpiCommunicator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
