"""Which transport a communicator uses for memory of devices: decided by rank 0 from what was probed, never guessed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mpitrain import _env
from mpitrain._errors import InputError
from mpitrain.comm import probing
from mpitrain.comm.transports.cuda_aware import CudaAwareTransport
from mpitrain.comm.transports.device import DeviceTransport
from mpitrain.comm.transports.ipc import IpcTransport
from mpitrain.comm.transports.nccl import NcclTransport
from mpitrain.comm.transports.staged import StagedTransport

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

_WHOLE: dict[str, type[StagedTransport | CudaAwareTransport]] = {
    each.name: each for each in (StagedTransport, CudaAwareTransport)
}
_PARTIAL: dict[str, type[NcclTransport | IpcTransport]] = {each.name: each for each in (NcclTransport, IpcTransport)}
_NAMES = (*_WHOLE, *_PARTIAL)


class Way(NamedTuple):
    """How memory of devices moves.

    Parameters
    ----------
    name : str
        Of the transport.
    why : str
        Why so, in a few words.
    probed : bool
        Whether that was probed, on rank 0's kind of machine.
    rest : str
        What moves that for which ``ipc`` or ``nccl`` is no way.
    """

    name: str
    why: str
    probed: bool = False
    rest: str = StagedTransport.name

    def transport(self, comm: Communicator) -> DeviceTransport:
        """Make the transport of a communicator.  Communicates nothing."""
        if self.name in _PARTIAL:
            return _PARTIAL[self.name](comm, _WHOLE[self.rest](comm))
        return _WHOLE[self.name](comm)

    @property
    def within_nodes(self) -> bool:
        """Whether it is only for ranks of one node."""
        return self.name == IpcTransport.name

    def between_nodes(self) -> Way:
        """Return the way for ranks of several nodes."""
        return self._replace(name=self.rest, why=f"{self.why}; between nodes, ipc cannot be used")


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
    if way.name not in _NAMES:
        raise InputError(
            "unknown transport", operation="MPITRAIN_DEVICE_TRANSPORT", got=way.name,
            expected=" or ".join(_NAMES),
        )  # fmt: skip
    if way.probed and len(set(ranks.allgather(probing.setting(library)))) > 1:
        return Way(StagedTransport.name, "ranks run on machines of several kinds, and one kind was probed")
    return way


def choose(library: str) -> Way:
    """Return what a rank chooses: what ``MPITRAIN_DEVICE_TRANSPORT`` asks for, or was found right; else ``staged``.

    Parameters
    ----------
    library : str
        What the MPI library calls itself.
    """
    wish = _env.device_transport()
    if wish is not None:
        return Way(wish, f"MPITRAIN_DEVICE_TRANSPORT={wish}")
    verdict, note = probing.known(library)
    right = [] if verdict is None else verdict.right
    rest = CudaAwareTransport.name if CudaAwareTransport.name in right else StagedTransport.name
    return Way(next((name for name in _PARTIAL if name in right), rest), note, probed=bool(right), rest=rest)
