"""What a backend is asked to do: one message or collective on contiguous memory, with everything checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from mpitrain._typing import Array, DType
from mpitrain.arrays.devices import Stream


@dataclass(frozen=True, eq=False)
class Call:
    """One primitive operation, as a backend performs it.

    Parameters
    ----------
    operation : str
        ``allreduce``, ``reduce``, ``broadcast``, ``reduce_scatter``, ``allgather``, ``gather``, ``scatter``,
        ``alltoall``, ``send``, ``recv`` or ``barrier``.
    dtype : dtype, optional
        Of the caller's array; the memory below holds its `mpitrain.arrays.dtypes.storage`.
    send : array, one-dimensional, optional
        What this rank sends.  None for ``allreduce``, ``reduce`` and ``broadcast``, which work in place on ``recv``.
    recv : array, one-dimensional, optional
        Where the result goes; None if this rank gets none.
    op : str, optional
        The reduction; ``mean`` is asked for as ``sum``.
    root, peer : int, optional
        Root of a collective; the other rank of a message.
    tag : int
        Of a message.
    counts : tuple of int, optional
        Elements of each rank's share where shares differ; None: all shares are equal.
    recv_counts : tuple of int, optional
        Of a ragged ``alltoall``: elements that come from each rank (``counts``: that go to each).
    algorithm : str, optional
        One of `mpitrain.comm.algorithms` that performs it, or the transport of device memory that does; None: the
        backend does.
    stream : Stream, optional
        ``send`` and ``recv`` are memory of a device, and this is where work on it is queued; None: host memory.
    parts : int
        In how many collectives, one after the other, memory of a device is moved through the host.
    """

    operation: str
    dtype: DType | None = None
    send: Array | None = None
    recv: Array | None = None
    op: str | None = None
    root: int | None = None
    peer: int | None = None
    tag: int = 0
    counts: tuple[int, ...] | None = None
    recv_counts: tuple[int, ...] | None = None
    algorithm: str | None = None
    stream: Stream | None = None
    parts: int = 1

    @property
    def logical_bytes(self) -> int:
        """Payload in the caller's dtype: the larger of what this rank hands in and what it gets."""
        elements = max((side.size for side in (self.send, self.recv) if side is not None), default=0)
        return int(elements) * (self.dtype.itemsize if self.dtype else 0)

    @property
    def route(self) -> str:
        """Which way a message goes; empty for a collective."""
        if self.peer is None:
            return ""
        return f" {'to' if self.operation == 'send' else 'from'} rank {self.peer}, tag {self.tag}"

    def __str__(self) -> str:
        """Say what all ranks of a collective must agree on."""
        agreed: dict[str, Any] = {"op": self.op, "root": self.root}
        if self.operation != "alltoall":
            agreed["counts"] = list(self.counts) if self.counts is not None else None
        agreed["algorithm"] = self.algorithm
        agreed["parts"] = self.parts if self.parts > 1 else None
        words = [f"{name}={value}" for name, value in agreed.items() if value is not None]
        if self.dtype is not None:
            words.insert(0, f"{self.dtype}{self._extent()}")
        return f"{self.operation}({', '.join(words)})"

    def _extent(self) -> str:
        if self.counts is not None:
            return ""
        shares = self.recv if self.operation in ("allreduce", "reduce", "broadcast", "scatter", "recv") else self.send
        return f"[{0 if shares is None else shares.size}]"


class Handle(Protocol):
    """An operation that a backend has begun."""

    def wait(self) -> None:
        """Block until it is complete; raise what it failed with, again when called again."""
        ...

    def test(self) -> bool:
        """Tell whether it is complete, or has failed, which `wait` says."""
        ...


@dataclass(frozen=True, eq=False)
class Prepared:
    """What one public method came down to: calls, and how their buffers become the result.

    ``tree`` is what the caller handed in, whose structure and shapes debug mode compares; None where they say nothing.
    That of ``sendrecv`` has both sides, as ``send`` and ``recv``.
    """

    operation: str
    calls: list[Call]
    finish: Callable[[], Any]
    tree: Any = None

    def __str__(self) -> str:
        """Say what was called; the calls below it are named where they are of another kind."""
        if all(self.operation in (call.operation, f"i{call.operation}") for call in self.calls):
            text = self.operation + " + ".join(str(call).removeprefix(call.operation) for call in self.calls)
        else:
            text = f"{self.operation}: {' + '.join(map(str, self.calls))}"
        return text + " and".join(dict.fromkeys(call.route for call in self.calls))
