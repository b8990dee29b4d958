"""Which transport a communicator uses for memory of devices: decided by rank 0 from what was probed, never guessed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mpitrain import _env
from mpitrain._errors import InputError
from mpitrain.comm.transports.cuda_aware import CudaAwareTransport
from mpitrain.comm.transports.device import DeviceTransport
from mpitrain.comm.transports.staged import StagedTransport

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

_TRANSPORTS: dict[str, type[DeviceTransport]] = {each.name: each for each in (StagedTransport, CudaAwareTransport)}


class Way(NamedTuple):
    """How memory of devices moves, and why so, in a few words."""

    name: str
    why: str

    def transport(self, comm: Communicator) -> DeviceTransport:
        """Make the transport of a communicator.  Communicates nothing."""
        return _TRANSPORTS[self.name](comm)


STAGED = Way(StagedTransport.name, "nothing else is known to work here: see mpitrain doctor --probe-gpu")

BETWEEN_THREADS = Way(StagedTransport.name, "ranks are threads, with no MPI library between them")


def choose() -> Way:
    """Return what this rank would choose: what ``MPITRAIN_DEVICE_TRANSPORT`` asks for, else ``staged``."""
    wish = _env.device_transport()
    return STAGED if wish is None else Way(wish, f"MPITRAIN_DEVICE_TRANSPORT={wish}")


def checked(way: Way) -> Way:
    """Return a way, if there is one of this name.

    Raises
    ------
    InputError
        ``MPITRAIN_DEVICE_TRANSPORT`` names none.
    """
    if way.name not in _TRANSPORTS:
        raise InputError(
            "unknown transport", operation="MPITRAIN_DEVICE_TRANSPORT", got=way.name,
            expected=" or ".join(_TRANSPORTS),
        )  # fmt: skip
    return way
