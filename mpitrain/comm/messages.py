"""Messages between two ranks, and Python objects, which are pickled and sent as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpitrain.comm import checks, objects, prepare
from mpitrain.comm.calls import Prepared
from mpitrain.comm.engine import Engine
from mpitrain.comm.request import Request


class Messages(Engine):
    """What one rank sends to another, and objects that all exchange."""

    def send(self, x: Any, dest: int, tag: int = 0) -> None:
        """Send arrays to a rank; may block until it receives them.

        Parameters
        ----------
        x : array, or tree of arrays
        dest : int
            The rank that receives.
        tag : int
            0 to 32766; messages of one tag arrive in order.
        """
        self._complete(self._send("send", x, dest, tag))

    def isend(self, x: Any, dest: int, tag: int = 0) -> Request:
        """Begin a `send`."""
        return self._start(self._send("isend", x, dest, tag))

    def _send(self, operation: str, x: Any, dest: int, tag: int) -> Prepared:
        dest = checks.rank(operation, "dest", dest, self.size)
        return prepare.send(operation, x, dest, checks.tag(operation, tag))

    def recv(self, like: Any, source: int, tag: int = 0, out: Any = None) -> Any:
        """Receive arrays from a rank.

        Parameters
        ----------
        like : array, or tree of arrays
            Of the dtype and shape that come; its values are not read.
        source : int
            The rank that sends.
        tag : int
            The sender's.
        out : like ``like``, optional
            Where the result goes; ``out=like`` overwrites.

        Raises
        ------
        MismatchError
            The message is of another size.  Let it end the job: of a longer one, Open MPI 5 has then written what was
            too much into memory behind the array, from 4 KiB on.
        """
        return self._complete(self._recv("recv", like, source, tag, out))

    def irecv(self, like: Any, source: int, tag: int = 0, out: Any = None) -> Request:
        """Begin a `recv`."""
        return self._start(self._recv("irecv", like, source, tag, out))

    def _recv(self, operation: str, like: Any, source: int, tag: int, out: Any) -> Prepared:
        source = checks.rank(operation, "source", source, self.size)
        return prepare.recv(operation, like, source, checks.tag(operation, tag), out)

    def sendrecv(self, x: Any, dest: int, source: int, tag: int = 0, like: Any = None, out: Any = None) -> Any:
        """Send to one rank and receive from another at the same time, which cannot deadlock.

        Parameters
        ----------
        x : array, or tree of arrays
            What is sent.
        dest, source : int
            The rank that receives, and the one received from.
        tag : int
            Of both messages.
        like : array, or tree of arrays, optional
            Of the dtype and shape that come; as ``x`` if None.
        out : like ``like``, optional
            Where the result goes.  It must not overlap ``x``.

        Raises
        ------
        MismatchError
            As of `recv`.
        """
        sent = self._send("sendrecv", x, dest, tag)
        got = self._recv("sendrecv", x if like is None else like, source, tag, out)
        if dest == source == self.rank:
            checks.own_message("sendrecv", sent.calls, got.calls)  # the library may cut it, and say nothing
        both = {"send": sent.tree, "recv": got.tree}
        return self._start(Prepared("sendrecv", [*got.calls, *sent.calls], got.finish, both)).wait()

    # Python objects.

    def broadcast_object(self, obj: Any, root: int = 0) -> Any:
        """Give the root's object to all.  Collective; pickles."""
        return objects.broadcast(self, obj, checks.rank("broadcast_object", "root", root, self.size))

    def gather_object(self, obj: Any, root: int = 0) -> list[Any] | None:
        """Collect every rank's object in a list, for the root; the others get None.  Collective; pickles."""
        return objects.gather(self, obj, checks.rank("gather_object", "root", root, self.size))

    def allgather_object(self, obj: Any) -> list[Any]:
        """Collect every rank's object in a list, for all.  Collective; pickles."""
        return objects.gather(self, obj, None) or []

    def scatter_object(self, objs: Sequence[Any] | None, root: int = 0) -> Any:
        """Give each rank its item of the root's sequence.  Collective; pickles."""
        return objects.scatter(self, objs, checks.rank("scatter_object", "root", root, self.size))

    def send_object(self, obj: Any, dest: int, tag: int = 0) -> None:
        """Send an object to a rank, which receives it with `recv_object`; pickles."""
        dest = checks.rank("send_object", "dest", dest, self.size)
        objects.send(self, obj, dest, checks.tag("send_object", tag))

    def recv_object(self, source: int, tag: int = 0) -> Any:
        """Receive an object from a rank."""
        source = checks.rank("recv_object", "source", source, self.size)
        return objects.recv(self, source, checks.tag("recv_object", tag))
