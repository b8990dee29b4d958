"""Where ranks of several nodes find each other by TCP: not by host names, which containers and clusters get wrong."""

from __future__ import annotations

import fcntl
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

_SIOCGIFADDR = 0x8915  # netdevice(7)
_NAME_BYTES = 15
_ADDRESS = slice(20, 24)
_PATIENCE_S = 2.0


@dataclass(frozen=True)
class Place:
    """Where all ranks reach rank 0.

    Parameters
    ----------
    address : str
        Of rank 0, IPv4; the same on all ranks.
    interface : str
        This rank's network interface on the way there.
    """

    address: str
    interface: str


def meet(comm: Communicator) -> Place | None:
    """Return the first address of rank 0's that all ranks can connect to, the loopback's first; None if there is none.

    Notes
    -----
    Collective.  Rank 0 listens at a port that the system chooses, and each rank tries all addresses.
    """
    own = addresses()
    with socket.create_server(("", 0), backlog=socket.SOMAXCONN) as listener:
        offered, port = comm.broadcast_object((list(own), listener.getsockname()[1]))
        ways = [own.get(_source(address, port)) for address in offered]
        everyones = comm.allgather_object(ways)
    for i, address in enumerate(offered):
        interface = ways[i]
        if interface is not None and all(each[i] is not None for each in everyones):
            return Place(address, interface)
    return None


def addresses() -> dict[str, str]:
    """Return this machine's IPv4 addresses and their interfaces, the loopback's first."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in sorted(socket.if_nameindex(), key=lambda each: each[1] != "lo"):
            with suppress(OSError):  # it has no IPv4 address
                answer = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", name.encode()[:_NAME_BYTES]))
                found[socket.inet_ntoa(answer[_ADDRESS])] = name
    return found


def _source(address: str, port: int) -> str:
    """Return this machine's own address on a connection; empty if none is made."""
    try:
        with socket.create_connection((address, port), _PATIENCE_S) as made:
            source: str = made.getsockname()[0]
            return source
    except OSError:
        return ""
