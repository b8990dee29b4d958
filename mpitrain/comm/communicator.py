"""The contract of a communicator: what every caller sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain._typing import Array
from mpitrain.comm import checks, dtypes, plan, shard_plans
from mpitrain.comm.algorithms import Links
from mpitrain.comm.calls import Call, Prepared
from mpitrain.comm.collectives import Collectives
from mpitrain.comm.ledger import Ledger
from mpitrain.comm.messages import Messages
from mpitrain.comm.plan import AllreducePlan
from mpitrain.comm.shard_plans import AllgatherPlan, ReduceScatterPlan
from mpitrain.comm.watchdog import Watch

if TYPE_CHECKING:
    from mpi4py import MPI


class Communicator(Collectives, Messages):
    """A group of ranks that exchange arrays.

    Attributes
    ----------
    rank, size : int
        Number of this rank, and of ranks.
    ledger : Ledger
        What this rank has communicated.
    library : str
        What the MPI library underneath calls itself; empty where there is none.

    Notes
    -----
    *Arrays* are those of NumPy, CuPy, PyTorch and JAX (outside of its transformations), what speaks DLPack, and
    buffers such as ``array.array``; of bool, integer, float16, bfloat16, float32, float64 or complex dtype, with any
    strides and any shape, 0-d and empty ones included; Python numbers count as 0-d arrays.  Dictionaries, lists and
    tuples of arrays may stand wherever one array may, and None for an array that is not there: ``allreduce``,
    ``reduce`` and ``broadcast`` pack them into one message per dtype, or into buckets, the others treat each array by
    itself.  A contiguous array in host memory is sent from where it lies.

    *Results* are new arrays in the library, dtype and device of the input, unless ``out`` (an array or tree of the
    result's library, shape and dtype) says where they go; where shapes agree it may be the input itself.  They never
    require grad; ``out`` may require it under ``torch.no_grad()``.  Memory that is read-only, or whose elements
    overlap, is refused, and so are places of a tree that overlap, unless they hold the same (tied parameters, or
    results in place of their inputs).  Results for DLPack objects are made by their ``__array_namespace__()``, or else
    are NumPy arrays, as they are for buffers.

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

    def __init__(self, rank: int, size: int, ledger: Ledger, watch: Watch | None = None) -> None:
        super().__init__(rank, size, ledger, watch)
        self._links = Links(self)

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
                self._keep(self._node)
            self._include(self._node)
        return self._node

    @property
    def leaders(self) -> Communicator | None:
        """The communicator of each node's rank 0; None on other ranks.  Collective over all ranks at its first use."""
        if self._leaders is None:
            self._leaders = (self.split(0 if self.node.rank == 0 else None, axis="leaders"),)
            self._keep(self._leaders[0])
        return self._leaders[0]

    def split(self, color: int | None, key: int = 0, axis: str = "split") -> Communicator | None:
        """Return a communicator of the ranks that gave the same colour.  Collective.

        Parameters
        ----------
        color : int or None
            0 to 2^31 − 1; None to be in none, and get None.
        key : int
            Ranks are ordered by key, then by rank.
        axis : str
            Name under which the ledger counts it.
        """
        self._watch.check_open("split")
        color, key = checks.color(color), checks.key(key)
        with self._together(Prepared(f"split(axis={axis!r})", [], lambda: None)):
            part = self._split(color, key, axis)
        if part is not None:
            self._include(part)
        return part

    def _executor(self) -> AbstractContextManager[Executor | None]:
        """Return a block in which the other ranks serve rank 0, which gets an executor over them.  Collective.

        The others get None, once rank 0 has left the block; so does rank 0 where nobody can serve it.
        """
        return nullcontext()

    # Shared memory and plans.

    @property
    def transport(self) -> str:
        """What reduces large arrays: ``"shared"`` memory, messages over the ``"network"``, or the ``"host"`` library.

        Collective at its first use.
        """
        return self._moves().name

    @property
    def transport_reason(self) -> str:
        """Why `transport` is what it is, in a few words.  Collective at its first use."""
        return self._moves().why

    @property
    def device_transport(self) -> str:
        """How memory of devices moves: ``"staged"`` through the host, ``"cuda_aware"``, ``"ipc"`` or ``"nccl"``.

        By MPI with the second; with the third, the ranks of a node read each other's.  ``"alone"``: there is one rank,
        and its memory stays where it is.
        """
        return self._device_way.name

    @property
    def device_transport_reason(self) -> str:
        """Why `device_transport` is what it is, in a few words."""
        return self._device_way.why

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
            Zeros, in the memory next to this rank; page-aligned where they are shared.  `allreduce` with ``out`` the
            same array, and `allreduce_plan`, reduce it (and equal views of it on all ranks) where it lies.  Ordinary
            memory where `transport` is not ``"shared"``.

        Raises
        ------
        StorageError
            On all ranks of a node that has not enough memory.

        Notes
        -----
        Released when no rank holds the array or a view of it any more, however the processes end.
        """
        self._watch.check_open("empty")
        element = dtypes.memory("empty", dtype)
        return self._moves().empty(checks.shape("empty", shape, element.itemsize), element)

    def allreduce_plan(self, buffer: Any, op: str = "sum", in_place: bool = False) -> AllreducePlan:
        """Check and lay out a reduction that is performed often.  Collective, as is every call of the plan.

        Parameters
        ----------
        buffer : NumPy array, or PyTorch tensor on the CPU; C-contiguous
            Its memory is reduced, with the values that it holds at each call; it may be written to between calls.
        op : {"sum", "mean", "min", "max", "prod", "and", "or"}
            As for `allreduce`.
        in_place : bool
            The result replaces the values in the buffer.

        Returns
        -------
        AllreducePlan
            ``plan()`` returns the result: the buffer, or a read-only array that keeps its values until the plan's
            next call.  For buffers from `empty` that are not small it is one array for all ranks of a node.  For a
            tensor it is a tensor, which cannot say that it is read-only: do not write to it.

        Notes
        -----
        Of a buffer of n bytes from `empty`, each of p ranks reads n bytes and writes n/p, or n in place; two fences.
        Small ones, of up to 1.5 KB where loops are compiled, are copied to the others, who combine all; one fence.
        """
        self._watch.check_open("allreduce_plan")
        target = plan.check(buffer, op)
        memory = target.host()
        planned = self._moves().plan(memory, op, in_place)
        if planned is None:
            planned = plan.ordinary(memory, op, in_place, self.size, self._bind)
        call = Call("allreduce", dtype=memory.dtype, recv=memory.reshape(-1), op=op)
        prepared = Prepared("allreduce_plan", [call], lambda: None, buffer)
        if self._checker is not None:
            planned = replace(planned, run=partial(self._checked, prepared, planned.run), guarded=False)
        return AllreducePlan(target, planned, prepared, self.ledger.meter(prepared), self._watch)

    def _checked(self, prepared: Prepared, run: Callable[[], object]) -> None:
        with self._together(prepared):
            run()

    def shared(self, shape: int | Sequence[int], dtype: Any = np.float32) -> Array:
        """Allocate one array for all ranks of a node.  Collective.

        Parameters
        ----------
        shape : int or sequence of int
            The same on all ranks.
        dtype : dtype
            Of its elements.

        Returns
        -------
        NumPy array
            Zeros, page-aligned; what one rank of the node writes, the others read after they have passed a plan's call
            together (`allgather_plan`).  Where `transport` is not ``"shared"``, each rank has one of its own.

        Raises
        ------
        StorageError
            On all ranks of a node that has not enough memory.

        Notes
        -----
        Released when no rank holds the array or a view of it any more, however the processes end.
        """
        self._watch.check_open("shared")
        element = dtypes.memory("shared", dtype)
        return self._moves().shared(checks.shape("shared", shape, element.itemsize), element)

    def reduce_scatter_plan(self, buffer: Array, op: str = "sum", in_rank_order: bool = False) -> ReduceScatterPlan:
        """Check and lay out a reduction by shards that is performed often.  Collective, as is every call of the plan.

        Parameters
        ----------
        buffer : array, shape (n,), of NumPy or CuPy
            Its memory is reduced, with the values that it holds at each call; it may be written to between calls.
            Afterwards it holds no values that mean anything.
        op : {"sum", "mean", "min", "max", "prod", "and", "or"}
            As for `allreduce`.
        in_rank_order : bool
            Whether rank r owns the r-th shard, wherever the ranks run, so that communicators of equal size cut equal
            buffers alike; it costs messages where that is another order than that of the node's memory.  The same on
            all ranks.

        Returns
        -------
        ReduceScatterPlan
            ``plan()`` returns this rank's shard, elements ``plan.begin`` to ``plan.end``; shards begin on cache lines
            and may be empty.

        Notes
        -----
        Of a buffer of n bytes from `empty`, each of p ranks reads n bytes and writes n/p; two fences, and nothing is
        sent within a node.  Elsewhere it is a `reduce_scatter`.
        """
        self._watch.check_open("reduce_scatter_plan")
        return shard_plans.reduce_scatter(self, buffer, op, in_rank_order)

    def allgather_plan(self, buffer: Array, begin: int, end: int) -> AllgatherPlan:
        """Lay out how all ranks get what each has written to its shard.  Collective, as is every call of the plan.

        Parameters
        ----------
        buffer : array, shape (n,), of NumPy or CuPy
            Of the same size on all ranks.
        begin, end : int
            The elements that this rank writes, e.g. those of a `ReduceScatterPlan`; the ranks' shards cover the buffer
            once.

        Returns
        -------
        AllgatherPlan
            ``plan()`` returns the buffer.

        Notes
        -----
        For a buffer from `shared` it is one fence, and across nodes an exchange of shards; else an `allgather`, for
        which the shards must lie in the order of the ranks.
        """
        self._watch.check_open("allgather_plan")
        return shard_plans.allgather(self, buffer, begin, end)
