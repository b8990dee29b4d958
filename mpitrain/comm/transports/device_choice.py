"""Which transport a communicator uses for memory of devices: decided by rank 0 from what was probed, never guessed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mpitrain import _env
from mpitrain._errors import InputError
from mpitrain.comm import probing
from mpitrain.comm.transports.cuda_aware import CudaAwareTransport
from mpitrain.comm.transports.device import DeviceTransport
from mpitrain.comm.transports.staged import StagedTransport

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

_TRANSPORTS: dict[str, type[DeviceTransport]] = {each.name: each for each in (StagedTransport, CudaAwareTransport)}


class Way(NamedTuple):
    """How memory of devices moves, why so in a few words, and whether that was probed, on rank 0's kind of machine."""

    name: str
    why: str
    probed: bool = False

    def transport(self, comm: Communicator) -> DeviceTransport:
        """Make the transport of a communicator.  Communicates nothing."""
        return _TRANSPORTS[self.name](comm)


class Ranks(Protocol):
    """What ranks need to agree, as mpi4py's communicators have it."""

    def bcast(self, obj: Any) -> Any:
        """Give rank 0's object to all."""
        ...

    def allgather(self, sendobj: Any) -> list[Any]:
        """Collect the objects of all ranks."""
        ...


BETWEEN_THREADS = Way(StagedTransport.name, "ranks are threads, with no MPI library between them")


def agree(ranks: Ranks, rank: int, library: str) -> Way:
    """Return the way that rank 0 chooses.  Collective.

    Raises
    ------
    InputError
        On all ranks: rank 0's ``MPITRAIN_DEVICE_TRANSPORT`` names none.
    """
    way: Way = ranks.bcast(choose(library) if rank == 0 else None)
    if way.name not in _TRANSPORTS:
        raise InputError(
            "unknown transport", operation="MPITRAIN_DEVICE_TRANSPORT", got=way.name,
            expected=" or ".join(_TRANSPORTS),
        )  # fmt: skip
    if way.probed and len(set(ranks.allgather(probing.setting(library)))) > 1:
        return Way(StagedTransport.name, "ranks run on machines of several kinds, and one kind was probed")
    return way


def choose(library: str) -> Way:
    """Return what a rank chooses: what ``MPITRAIN_DEVICE_TRANSPORT`` asks for, or what was probed; else ``staged``.

    Parameters
    ----------
    library : str
        What the MPI library calls itself.
    """
    wish = _env.device_transport()
    if wish is not None:
        return Way(wish, f"MPITRAIN_DEVICE_TRANSPORT={wish}")
    verdict, note = probing.known(library)
    if verdict is not None and not verdict.problem:
        return Way(CudaAwareTransport.name, note, probed=True)
    return Way(StagedTransport.name, note)
