"""Which transport a communicator uses for memory of devices: decided by rank 0 from what was probed, never guessed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mpitrain import _env
from mpitrain._errors import InputError
from mpitrain.comm import probing
from mpitrain.comm.transports.alone import AloneTransport
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
"""Of those that can be asked for."""


class Way(NamedTuple):
    """How memory of devices moves.

    Parameters
    ----------
    names : tuple of str
        Of transports: the first takes what it can, the next what that leaves, and the last all else.
    why : str
        Why so, in a few words.
    probed : bool
        Whether that was probed, on rank 0's kind of machine.
    asked : bool
        Whether it was asked for, so that it is taken whatever there is.
    """

    names: tuple[str, ...]
    why: str
    probed: bool = False
    asked: bool = False

    @property
    def name(self) -> str:
        """The first transport's."""
        return self.names[0]

    def transport(self, comm: Communicator) -> DeviceTransport:
        """Make the transport of a communicator.  Communicates nothing."""
        *partial, last = self.names
        made: DeviceTransport = _WHOLE[last](comm)
        for name in reversed(partial):
            kind = AloneTransport if name == AloneTransport.name else _PARTIAL[name]
            made = kind(comm, made, insists=not self.probed)
        return made

    def among(self, size: int) -> Way:
        """Return the way of a communicator with so many ranks: one alone moves nothing, unless it was asked for."""
        if size > 1 or self.asked or self.name == AloneTransport.name:
            return self
        return self._replace(names=(AloneTransport.name, *self.names), why="there is one rank")

    def without(self, name: str, problem: str) -> Way:
        """Return the way without a transport that could not be opened."""
        return self._replace(names=tuple(n for n in self.names if n != name), why=f"{self.why}; {name}: {problem}")

    def between_nodes(self) -> Way:
        """Return the way for ranks of several nodes: without ``ipc``, and without NCCL unless it was asked for.

        NCCL was probed within a node.
        """
        left = tuple(n for n in self.names if n in _WHOLE or (n == NcclTransport.name and not self.probed))
        return self if left == self.names else self._replace(names=left, why=f"{self.why}; ranks are on several nodes")


class Ranks(Protocol):
    """What ranks need to agree, as mpi4py's communicators have it."""

    def bcast(self, obj: Any) -> Any:
        """Give rank 0's object to all."""
        ...

    def allgather(self, sendobj: Any) -> list[Any]:
        """Collect the objects of all ranks."""
        ...


BETWEEN_THREADS = Way((StagedTransport.name,), "ranks are threads, with no MPI library between them")


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
        return Way((StagedTransport.name,), "ranks run on machines of several kinds, and one kind was probed")
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
        names = (wish, StagedTransport.name) if wish in _PARTIAL else (wish,)
        return Way(names, f"MPITRAIN_DEVICE_TRANSPORT={wish}", asked=True)
    verdict, note = probing.known(library)
    right = [] if verdict is None else verdict.right
    whole = next((name for name in _WHOLE if name in right), StagedTransport.name)
    return Way((*(name for name in _PARTIAL if name in right), whole), note, probed=bool(right))
