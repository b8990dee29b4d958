"""The contract of a communicator: what every caller sees, over the few hooks that a backend fills in.

A public method checks its arguments and lays out its buffers (`mpitrain.comm.prepare`), counts itself in the ledger,
and hands contiguous host memory to the backend.  So a backend is four methods, and all backends behave alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np

from mpitrain._errors import CommunicationError, InputError
from mpitrain._typing import Array
from mpitrain.arrays.dtypes import accumulator
from mpitrain.comm import algorithms, checks, dtypes, objects, plan, prepare
from mpitrain.comm import reproducible as fixed
from mpitrain.comm.buffers import wire
from mpitrain.comm.calls import Call, Handle, Prepared
from mpitrain.comm.ledger import Ledger
from mpitrain.comm.plan import AllreducePlan
from mpitrain.comm.prepare import Counts
from mpitrain.comm.request import Request
from mpitrain.comm.transports.host import HostTransport
from mpitrain.comm.transports.transport import Transport
from mpitrain.comm.watchdog import Watch, checked_timeout, watchdog

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpitrain.comm.debug import Checker
    from mpitrain.comm.tuning import Table


class Communicator(ABC):
    """A group of ranks that exchange arrays.

    Attributes
    ----------
    rank, size : int
        Number of this rank, and of ranks.
    ledger : Ledger
        What this rank has communicated.
    library : str
        What the MPI library underneath calls itself; empty where there is none.
    tuning : Table or None
        Chooses the algorithm of a call that names none; None: the backend's own way.  The same on all ranks.

    Notes
    -----
    *Arrays* are NumPy or CuPy arrays of bool, integer, float16, bfloat16, float32, float64 or complex dtype, with any
    strides and any shape, 0-d and empty ones included; Python numbers count as 0-d arrays.  Dictionaries, lists and
    tuples of arrays may stand wherever one array may: ``allreduce``, ``reduce`` and ``broadcast`` pack them into one
    message per dtype, the others treat each array by itself.

    *Results* are new arrays in the library and dtype of the input, unless ``out`` (an array or tree of the result's
    shape and dtype) says where they go; where shapes agree it may be the input itself.

    *Collective* methods must be called by all ranks, in the same order, with arrays of the same dtype and of shapes
    that fit.  16-bit floats are reduced in float32 and rounded once.  Methods that begin with ``i`` do not block;
    they return a `Request`, whose ``wait`` gives the result, and must be matched by the same method on the other
    ranks.

    With p ranks, latency α and time per byte β, n bytes cost at least: broadcast, reduce α log₂p + βn; allreduce
    2α log₂p + 2(p−1)/p βn; allgather, reduce_scatter, scatter, gather, alltoall (n: the larger side)
    α log₂p + (p−1)/p βn (R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication operations
    in MPICH", IJHPCA 19, 2005, section 4).

    *Algorithms*: ``algorithm`` names one of mpitrain's own (see `mpitrain.comm.algorithms`), ``"default"`` the
    backend's way; it must be the same on all ranks.  None leaves it to ``tuning``.  Methods that begin with ``i`` are
    always performed by the backend.
    """

    library = ""

    def __init__(self, rank: int, size: int, ledger: Ledger, watch: Watch | None = None) -> None:
        self.rank = rank
        self.size = size
        self.ledger = ledger
        self._watch = watch or Watch(ledger.axis)
        self._checker: Checker | None = None
        self._freed = False
        self._under_way: list[Handle] = []
        self._node: Communicator | None = None
        self._leaders: tuple[Communicator | None] | None = None
        self.tuning: Table | None = None
        self._transport: Transport | None = None
        self._links = algorithms.Links(self)

    # What a backend fills in.

    @abstractmethod
    def _run(self, call: Call) -> None:
        """Perform a call; return when this rank's memory may be used again."""

    @abstractmethod
    def _begin(self, call: Call) -> Handle:
        """Begin a call."""

    @abstractmethod
    def _split(self, color: int | None, key: int, axis: str) -> Communicator | None:
        """Return the communicator of the ranks of this colour, ordered by key and then rank."""

    @abstractmethod
    def _split_node(self) -> Communicator:
        """Return the communicator of the ranks that share memory with this one."""

    @abstractmethod
    def abort(self, code: int = 1) -> NoReturn:
        """End all ranks of the job at once, with this exit code."""

    @abstractmethod
    def _free(self) -> None:
        """Release what the backend holds."""

    def _choose_transport(self) -> Transport:
        """Return what reduces large arrays; called once, by all ranks.  A backend that has a better one says so."""
        return HostTransport()

    def _bind(self, values: Array, op: str) -> Callable[[], None]:
        """Return what reduces a flat array in place, over and over, checked already."""
        dtype = values.dtype
        if accumulator(dtype) != dtype:  # it travels in another type, through memory of its own each time
            return lambda: self._complete(self._allreduce("allreduce_plan", values, op, values))
        call = Call("allreduce", dtype=dtype, recv=wire(values), op=op)
        return partial(self._run, call)

    def _meet(self, call: Call) -> None:
        """Refuse a call of one of our own algorithms that other ranks perform otherwise, where that can be told."""
        return

    def _new_checker(self) -> Checker | None:
        """Return what checks calls in debug mode; None for a backend that always does."""
        return None

    # Guard.

    @property
    def debug(self) -> bool:
        """Whether every call is checked against those of the other ranks before it runs.

        Set it on all ranks at the same point of the program; ``MPITRAIN_DEBUG=1`` sets it from the start.  What is
        split from this communicator afterwards inherits it.
        """
        return self._checker is not None

    @debug.setter
    def debug(self, on: bool) -> None:
        self._checker = self._new_checker() if on else None
        self._watch.debug = self.debug
        watchdog.nudge()

    @property
    def timeout_s(self) -> float:
        """Seconds that a call may wait for other ranks; 0: for ever.

        After that it raises in debug mode; without, the watchdog ends the job.  600 by default, 60 in debug mode, else
        what ``MPITRAIN_TIMEOUT_S`` says.  What is split from this communicator afterwards inherits it.
        """
        return self._watch.timeout_s

    @timeout_s.setter
    def timeout_s(self, value: float) -> None:
        self._watch.chosen_s = checked_timeout("timeout_s", value)
        watchdog.nudge()

    # Groups.

    @staticmethod
    def from_mpi(comm: MPI.Intracomm) -> Communicator:
        """Return a communicator over the ranks of an mpi4py one, which works on a private duplicate.  Collective."""
        from mpitrain.comm.mpi import MpiCommunicator

        return MpiCommunicator.duplicate(comm)

    @property
    def node(self) -> Communicator:
        """The communicator of the ranks on this node; kept.  Collective over all ranks at its first use."""
        if self._node is None:
            with self._together(Prepared("node", [], lambda: None)):
                self._node = self._split_node()
        return self._node

    @property
    def leaders(self) -> Communicator | None:
        """The communicator of each node's rank 0; None on other ranks.  Collective over all ranks at its first use."""
        if self._leaders is None:
            self._leaders = (self.split(0 if self.node.rank == 0 else None, axis="leaders"),)
        return self._leaders[0]

    def split(self, color: int | None, key: int = 0, axis: str = "split") -> Communicator | None:
        """Return a communicator of the ranks that gave the same colour.  Collective.

        Parameters
        ----------
        color : int or None
            0 or more; None to be in none, and get None.
        key : int
            Ranks are ordered by key, then by rank.
        axis : str
            Name under which the ledger counts it.
        """
        self._check_open("split")
        color = checks.color(color)
        with self._together(Prepared(f"split(axis={axis!r})", [], lambda: None)):
            return self._split(color, key, axis)

    # Collectives.

    def allreduce(
        self, x: Any, op: str = "sum", out: Any = None, algorithm: str | None = None, reproducible: bool = False
    ) -> Any:
        """Reduce over all ranks, for all.  Collective.

        Parameters
        ----------
        x : array, or tree of arrays
            The same shapes and dtypes on all ranks.
        op : {"sum", "mean", "min", "max", "prod", "and", "or"}
            ``and`` and ``or`` are bitwise on integers.  ``min`` and ``max`` of NaN are undefined.
        out : like ``x``, optional
            Where the result goes; ``out=x`` reduces in place.
        algorithm : {"ring", "recursive", "doubling", "tree", "ordered", "hierarchical", "default"}, optional
            How it is performed.
        reproducible : bool
            Sum, or take the mean, in fixed point: the same bits for every order of the ranks, algorithm and backend,
            off by at most p·2^−53 times the largest magnitude of each array in x before it is rounded once (below
            1024 ranks; see `mpitrain.arrays.FixedPoint`).  Moves 4 bytes per array in a maximum, and 8 per element.

        Returns
        -------
        like ``x``
            The same on all ranks.

        Raises
        ------
        InputError, DtypeError
            Arguments that cannot be used; nothing was communicated.
        NonFiniteError
            ``reproducible`` only: x holds an infinity or NaN on some rank, or a sum is beyond the dtype's range.
        CommunicationError
            The exchange failed.
        """
        if reproducible:
            return fixed.allreduce(self, x, op, out, algorithm)
        return self._complete(self._allreduce("allreduce", x, op, out), algorithm)

    def iallreduce(self, x: Any, op: str = "sum", out: Any = None) -> Request:
        """Begin an `allreduce`."""
        return self._start(self._allreduce("iallreduce", x, op, out))

    def _allreduce(self, operation: str, x: Any, op: str, out: Any) -> Prepared:
        return prepare.reduction(operation, self.size, x, op, out, None, True)

    @property
    def transport(self) -> str:
        """What reduces large arrays: ``"shared"`` memory or the ``"host"`` library.  Collective at its first use."""
        return self._moves().name

    def _moves(self) -> Transport:
        if self._transport is None:
            self._transport = self._choose_transport()
        return self._transport

    def empty(self, shape: int | Sequence[int], dtype: Any = np.float32) -> Array:
        """Allocate memory that the ranks of a node share, each its own array.  Collective.

        Parameters
        ----------
        shape : int or sequence of int
            Of this rank's array; others may ask for other shapes.
        dtype : dtype
            Of its elements.

        Returns
        -------
        NumPy array
            Zeros, page-aligned, in the memory next to this rank.  `allreduce` with ``out`` the same array, and
            `allreduce_plan`, reduce it (and equal views of it on all ranks) where it lies.  Ordinary memory where
            `transport` is ``"host"``.

        Raises
        ------
        StorageError
            On all ranks of a node that has not enough memory.

        Notes
        -----
        Released when no rank holds the array or a view of it any more, however the processes end.
        """
        self._check_open("empty")
        return self._moves().empty(checks.shape("empty", shape), dtypes.memory("empty", dtype))

    def allreduce_plan(self, buffer: Array, op: str = "sum", in_place: bool = False) -> AllreducePlan:
        """Check and lay out a reduction that is performed often.  Collective, as is every call of the plan.

        Parameters
        ----------
        buffer : NumPy array, C-contiguous
            Its memory is reduced, with the values that it holds at each call; it may be written to between calls.
        op : {"sum", "mean", "min", "max", "prod", "and", "or"}
            As for `allreduce`.
        in_place : bool
            The result replaces the values in the buffer.

        Returns
        -------
        AllreducePlan
            ``plan()`` returns the result: the buffer, or a read-only array that keeps its values until the plan's
            next call.  For buffers from `empty` that is one array for all ranks of a node.

        Notes
        -----
        Of a buffer of n bytes from `empty`, each of p ranks reads n bytes and writes n/p, or n in place; two fences.
        """
        self._check_open("allreduce_plan")
        buffer = plan.check(buffer, op)
        planned = self._moves().plan(buffer, op, in_place)
        if planned is None:
            planned = plan.ordinary(buffer, op, in_place, self.size, self._bind)
        call = Call("allreduce", dtype=buffer.dtype, recv=buffer.reshape(-1), op=op)
        prepared = Prepared("allreduce_plan", [call], lambda: None, buffer)
        if self._checker is not None:
            planned = replace(planned, run=partial(self._checked, prepared, planned.run))
        return AllreducePlan(buffer, planned, prepared, self.ledger.meter(prepared), self._watch)

    def _checked(self, prepared: Prepared, run: Callable[[], object]) -> None:
        with self._together(prepared):
            run()

    def reduce(
        self,
        x: Any,
        op: str = "sum",
        root: int = 0,
        out: Any = None,
        algorithm: str | None = None,
        reproducible: bool = False,
    ) -> Any:
        """Reduce over all ranks, for the root; the others get None.  Collective; arguments as for `allreduce`.

        Algorithms: ``ring``, ``tree``, ``ordered``.
        """
        if reproducible:
            return fixed.reduce(self, x, op, root, out, algorithm)
        return self._complete(self._reduce("reduce", x, op, root, out), algorithm)

    def ireduce(self, x: Any, op: str = "sum", root: int = 0, out: Any = None) -> Request:
        """Begin a `reduce`."""
        return self._start(self._reduce("ireduce", x, op, root, out))

    def _reduce(self, operation: str, x: Any, op: str, root: int, out: Any) -> Prepared:
        root = checks.rank(operation, "root", root, self.size)
        return prepare.reduction(operation, self.size, x, op, out, root, self.rank == root)

    def broadcast(self, x: Any, root: int = 0, out: Any = None, algorithm: str | None = None) -> Any:
        """Give the root's values to all.  Collective.

        Parameters
        ----------
        x : array, or tree of arrays
            On the root, the values; elsewhere anything of the same shapes and dtypes, whose values are not read.
        root : int
            The rank that has the values.
        out : like ``x``, optional
            Where the result goes; ``out=x`` overwrites.
        algorithm : {"ring", "tree", "default"}, optional
            How it is performed.
        """
        return self._complete(self._broadcast("broadcast", x, root, out), algorithm)

    def ibroadcast(self, x: Any, root: int = 0, out: Any = None) -> Request:
        """Begin a `broadcast`."""
        return self._start(self._broadcast("ibroadcast", x, root, out))

    def _broadcast(self, operation: str, x: Any, root: int, out: Any) -> Prepared:
        root = checks.rank(operation, "root", root, self.size)
        return prepare.broadcast(operation, x, root, out, self.rank == root)

    def reduce_scatter(
        self,
        x: Any,
        op: str = "sum",
        counts: Counts = None,
        out: Any = None,
        algorithm: str | None = None,
        reproducible: bool = False,
    ) -> Any:
        """Reduce over all ranks, and give each its share of the rows.  Collective.

        Parameters
        ----------
        x : array, shape (size, …), or (sum(counts), …) with ``counts``
            The same shape and dtype on all ranks.
        op : str
            As for `allreduce`.
        counts : sequence of int, optional
            Rows that each rank gets, the same on all ranks; zeros are allowed.
        out : array, optional
            Where the result goes.
        algorithm : {"ring", "recursive", "ordered", "default"}, optional
            How it is performed.
        reproducible : bool
            As for `allreduce`.

        Returns
        -------
        array, shape (…), or (counts[rank], …) with ``counts``
        """
        if reproducible:
            return fixed.reduce_scatter(self, x, op, counts, out, algorithm)
        return self._complete(self._reduce_scatter("reduce_scatter", x, op, counts, out), algorithm)

    def ireduce_scatter(self, x: Any, op: str = "sum", counts: Counts = None, out: Any = None) -> Request:
        """Begin a `reduce_scatter`."""
        return self._start(self._reduce_scatter("ireduce_scatter", x, op, counts, out))

    def _reduce_scatter(self, operation: str, x: Any, op: str, counts: Counts, out: Any) -> Prepared:
        return prepare.reduce_scatter(operation, self.rank, self.size, x, op, counts, out)

    def allgather(self, x: Any, counts: Counts = None, out: Any = None, algorithm: str | None = None) -> Any:
        """Collect every rank's array, for all.  Collective.

        Parameters
        ----------
        x : array, shape (…), or (counts[rank], …) with ``counts``
            The same shape on all ranks but for the number of rows.
        counts : sequence of int, optional
            Rows that each rank gives, the same on all ranks; zeros are allowed.
        out : array, optional
            Where the result goes.
        algorithm : {"ring", "recursive", "default"}, optional
            How it is performed.

        Returns
        -------
        array, shape (size, …), or (sum(counts), …) with ``counts``
            The same on all ranks.
        """
        return self._complete(self._gather("allgather", x, None, counts, out), algorithm)

    def iallgather(self, x: Any, counts: Counts = None, out: Any = None) -> Request:
        """Begin an `allgather`."""
        return self._start(self._gather("iallgather", x, None, counts, out))

    def gather(self, x: Any, root: int = 0, counts: Counts = None, out: Any = None) -> Any:
        """Collect every rank's array, for the root; the others get None.  Collective; as `allgather`."""
        root = checks.rank("gather", "root", root, self.size)
        return self._complete(self._gather("gather", x, root, counts, out))

    def _gather(self, operation: str, x: Any, root: int | None, counts: Counts, out: Any) -> Prepared:
        return prepare.gathering(operation, self.rank, self.size, x, counts, out, root)

    def scatter(self, x: Any, root: int = 0, counts: Counts = None, out: Any = None) -> Any:
        """Give each rank its share of the root's rows.  Collective.

        Parameters
        ----------
        x : array, shape (size, …), or (sum(counts), …) with ``counts``
            Read on the root only; None will do elsewhere, for a short header goes ahead and tells dtype and shape.
        root : int
            The rank that has the values.
        counts : sequence of int, optional
            Rows that each rank gets; zeros are allowed.  Read on the root only.
        out : array, optional
            Where the result goes.

        Returns
        -------
        array, shape (…), or (counts[rank], …) with ``counts``
            Off the root, a NumPy array.
        """
        root = checks.rank("scatter", "root", root, self.size)
        sends = self.rank == root
        header = prepare.scatter_header("scatter", self.size, x, counts) if sends else None
        like, shares = objects.broadcast(self, header, root)
        whole = x if sends else prepare.placeholders(like)
        return self._complete(prepare.scatter("scatter", self.rank, self.size, whole, root, shares, out))

    def alltoall(self, x: Any, counts: Counts = None, recv_counts: Counts = None, out: Any = None) -> Any:
        """Give row i to rank i, and get one row from each.  Collective.

        Parameters
        ----------
        x : array, shape (size, …), or (sum(counts), …) with ``counts``
            The same dtype and row shape on all ranks.
        counts : sequence of int, optional
            Rows for each rank; zeros are allowed.  With or without them on all ranks alike.
        recv_counts : sequence of int, optional
            Rows that come from each rank, where all ranks know them; else they are exchanged first.
        out : array, optional
            Where the result goes.

        Returns
        -------
        array, shape (size, …), or (sum(recv_counts), …) with ``counts``
            In the order of the ranks that they come from.
        """
        shares = None if counts is None else checks.counts("alltoall", counts, self.size)
        if shares is not None and recv_counts is None:
            exchange = prepare.alltoall("alltoall", self.size, np.array(shares, np.int64), None, None, None)
            recv_counts = self._complete(exchange).tolist()
        return self._complete(self._alltoall("alltoall", x, shares, recv_counts, out))

    def ialltoall(self, x: Any, counts: Counts = None, recv_counts: Counts = None, out: Any = None) -> Request:
        """Begin an `alltoall`; ``counts`` need ``recv_counts``."""
        if (counts is None) != (recv_counts is None):
            raise InputError("give counts and recv_counts, or neither", operation="ialltoall")
        return self._start(self._alltoall("ialltoall", x, counts, recv_counts, out))

    def _alltoall(self, operation: str, x: Any, counts: Counts, recv_counts: Counts, out: Any) -> Prepared:
        shares = None if counts is None else checks.counts(operation, counts, self.size)
        recv_shares = None if recv_counts is None else checks.counts(operation, recv_counts, self.size)
        return prepare.alltoall(operation, self.size, x, shares, recv_shares, out)

    def barrier(self) -> None:
        """Return once every rank has called this.  Collective."""
        self._complete(Prepared("barrier", [Call("barrier")], lambda: None))

    def ibarrier(self) -> Request:
        """Begin a `barrier`: complete once every rank has begun it."""
        return self._start(Prepared("ibarrier", [Call("barrier")], lambda: None))

    # Messages.

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
            The message is of another size.
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
        """
        sent = self._send("sendrecv", x, dest, tag)
        got = self._recv("sendrecv", x if like is None else like, source, tag, out)
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

    # Life.

    def free(self) -> None:
        """Release the communicator once what is under way has completed; it cannot be used afterwards.  Collective."""
        if self._freed:
            return
        with self._together(Prepared("free()", [], lambda: None)):
            for handle in self._under_way:
                handle.wait()
            self._under_way.clear()
            self._freed = True
            if self._transport is not None:
                self._transport.free()
            self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:  # after an error the other ranks may never come here, and freeing would wait for them
            self.free()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, size={self.size}, axis={self.ledger.axis!r})"

    def _complete(self, prepared: Prepared, algorithm: str | None = None) -> Any:
        """Perform what was prepared and return its result."""
        self._check_open(prepared.operation)
        prepared = algorithms.assign(self, prepared, algorithm)
        self.ledger.record(prepared)
        watch = self._watch
        outer, watch.current = watch.current, prepared
        try:
            if self._checker is not None:
                self._checker.meet(prepared)
            for call in prepared.calls:
                if call.algorithm is None:
                    self._run(call)
                else:
                    algorithms.perform(self, call)
        finally:
            watch.current = outer
            watch.count += 1
        return prepared.finish()

    @contextmanager
    def _together(self, prepared: Prepared) -> Iterator[None]:
        """Do in the block what is collective without being a call of the backend's."""
        with self._watch.during(prepared):
            if self._checker is not None:
                self._checker.meet(prepared)
            yield

    def _start(self, prepared: Prepared) -> Request:
        """Begin what was prepared.

        What belongs to a request is kept here until it is complete, even if that is dropped: the backend still uses
        its buffers.
        """
        self._check_open(prepared.operation)
        self.ledger.record(prepared)
        meetings = self._checker.announce(prepared) if self._checker else ()
        handles = [self._begin(call) for call in prepared.calls]
        self._under_way = [each for each in self._under_way if not each.test()] + handles
        return Request(handles, prepared.finish, prepared, self._watch, meetings)

    def _check_open(self, operation: str) -> None:
        if self._freed:
            raise CommunicationError("the communicator was freed", operation=operation)
