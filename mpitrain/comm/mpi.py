"""The backend over MPI, through mpi4py's buffer methods; importing this starts MPI unless the caller did."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any, NoReturn, cast

from mpi4py import MPI

from mpitrain import _env
from mpitrain._errors import CommunicationError, MismatchError
from mpitrain._options import check_kind
from mpitrain._typing import Array, DType
from mpitrain.arrays.dtypes import accumulator
from mpitrain.comm import pieces
from mpitrain.comm.buffers import wire
from mpitrain.comm.calls import Call, Handle
from mpitrain.comm.channel import Channel
from mpitrain.comm.checks import TAG_MAX
from mpitrain.comm.communicator import Communicator
from mpitrain.comm.debug import Checker
from mpitrain.comm.ledger import Ledger
from mpitrain.comm.pieces import Pieces
from mpitrain.comm.transports import device_choice, entry
from mpitrain.comm.transports.choice import choose, ranks_per_node
from mpitrain.comm.transports.entry import Entry, Library, Ranks
from mpitrain.comm.transports.pages import PAGE_BYTES
from mpitrain.comm.transports.transport import Planned, Transport
from mpitrain.comm.watchdog import Watch

_DATATYPES: dict[str, MPI.Datatype] = {
    "int8": MPI.INT8_T,
    "int16": MPI.INT16_T,
    "int32": MPI.INT32_T,
    "int64": MPI.INT64_T,
    "uint8": MPI.UINT8_T,
    "uint16": MPI.UINT16_T,
    "uint32": MPI.UINT32_T,
    "uint64": MPI.UINT64_T,
    "float32": MPI.FLOAT,
    "float64": MPI.DOUBLE,
    "complex64": MPI.C_FLOAT_COMPLEX,
    "complex128": MPI.C_DOUBLE_COMPLEX,
}

_OPS: dict[str, MPI.Op] = {
    "sum": MPI.SUM,
    "prod": MPI.PROD,
    "min": MPI.MIN,
    "max": MPI.MAX,
    "and": MPI.BAND,
    "or": MPI.BOR,
}


class MpiCommunicator(Communicator):
    """Ranks of an MPI job, on host memory.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Becomes this object's own; `duplicate` leaves the caller's alone.
    ledger : Ledger
        Where it is counted.
    channel : Channel
        Private lines of the guard's, to all ranks of the communicator that this was split from.
    name : str
        The same on all ranks, and different from that of any other communicator that two of them share; empty for the
        one that all others of the channel were split from.
    timeout_s : float, optional
        As the user chose it.
    """

    def __init__(
        self, comm: MPI.Intracomm, ledger: Ledger, channel: Channel, name: str = "", timeout_s: float | None = None
    ) -> None:  # fmt: skip
        watch = Watch(ledger.axis, channel, timeout_s, name, _members(comm, channel.group))
        super().__init__(comm.Get_rank(), comm.Get_size(), ledger, watch)
        self._channel, self._name, self._splits, self._checkers = channel, name, 0, 0
        self._windows: list[MPI.Win] = []
        self._comm = comm
        self.library = MPI.Get_library_version().split("\n")[0].rstrip("\0 ")
        comm.Set_errhandler(MPI.ERRORS_RETURN)  # mpi4py turns what is returned into exceptions

    @classmethod
    def duplicate(cls, comm: MPI.Intracomm) -> MpiCommunicator:
        """Return a communicator over a private duplicate of ``comm``.  Collective."""
        check_kind("from_mpi", "comm", comm, MPI.Intracomm, "a communicator of mpi4py's, e.g. MPI.COMM_WORLD")
        with _translated("from_mpi"):
            made = cls(comm.Dup(), Ledger(), Channel(comm.Dup()))
            made._device_way = device_choice.agree(made._comm, made.rank, made.library).among(made.size)
        made.debug = _env.debug()
        if made.size > 1 and len(made._device_way.names) > 1 and made.node.size < made.size:
            made._device_way = made._device_way.between_nodes()
        return made

    def _run(self, call: Call) -> None:
        if call.operation == "allreduce":
            assert call.recv is not None
            assert call.op is not None
            if self._moved(call.recv, call.recv, call.op):
                return
        if pieces.is_long(call, self.size):
            self._run_pieces(pieces.cut(call, self.rank, self.size))
            return
        if call.operation == "recv":  # only a request's status tells how much came
            self._begin(call).wait()
            return
        with _translated(call):
            name, arguments = _message(call, self.rank)
            getattr(self._comm, name)(*arguments)

    def _run_pieces(self, cut: Pieces) -> None:
        messages = [self._begin(piece) for piece in cut.calls if piece.peer is not None]
        for piece in cut.calls:
            if piece.peer is None:
                self._run(piece)
        _Joint(messages, cut.finish).wait()

    def _begin(self, call: Call) -> Handle:
        if pieces.is_long(call, self.size):
            cut = pieces.cut(call, self.rank, self.size)
            return _Joint([self._begin(piece) for piece in cut.calls], cut.finish)
        with _translated(call):
            name, arguments = _message(call, self.rank)
            return _MpiHandle(call, getattr(self._comm, f"I{name.lower()}")(*arguments))

    def _split(self, color: int | None, key: int, axis: str) -> Communicator | None:
        with _translated("split"):
            comm = self._comm.Split(MPI.UNDEFINED if color is None else color, key)
        return self._child(comm, axis)

    def _allreduce_now(self, send: Array, recv: Array, op: str) -> None:
        if self._moved(send, recv, op):
            return
        if recv.size > pieces.CHUNK_ELEMENTS:
            super()._allreduce_now(send, recv, op)
            return
        self._library_allreduce(MPI.IN_PLACE if send is recv else send, recv, _OPS[op])

    def _moved(self, send: Array, recv: Array, op: str) -> bool:
        """Let the transport reduce an array into another, or in place, and tell whether it did."""
        moves = self._transport or self._moves()
        if recv.nbytes < moves.least_bytes:
            return False
        flat = recv.reshape(-1)
        return moves.allreduce(flat if send is recv else send.reshape(-1), flat, op)

    def _bind(self, send: Array, recv: Array, op: str) -> Planned:
        left = recv.nbytes < self._moves().least_bytes and accumulator(recv.dtype) == recv.dtype
        if not left or recv.size > pieces.CHUNK_ELEMENTS:
            return super()._bind(send, recv, op)
        if self._entry is not None and entry.knows(recv.dtype, op):
            return Planned(partial(self._entry.planned, send, op, recv), recv, guarded=True)
        given, into = MPI.IN_PLACE if send is recv else _spec(wire(send)), _spec(wire(recv))
        return Planned(partial(self._library_allreduce, given, into, _OPS[op]), recv)

    def _library_allreduce(self, send: Any, recv: Any, op: MPI.Op) -> None:
        try:
            self._comm.Allreduce(send, recv, op)
        except MPI.Exception as error:
            raise _translation("allreduce", error) from error

    def _reduce_now(self, send: Array, recv: Array, op: str, root: int) -> None:
        if send.size > pieces.CHUNK_ELEMENTS:
            super()._reduce_now(send, recv, op, root)
            return
        is_root = self.rank == root
        given, into = MPI.IN_PLACE if is_root and send is recv else send, recv if is_root else None
        try:
            self._comm.Reduce(given, into, _OPS[op], root)
        except MPI.Exception as error:
            raise _translation(f"reduce of {send.size} {send.dtype}", error) from error

    def _broadcast_now(self, values: Array, root: int) -> None:
        if values.size > pieces.CHUNK_ELEMENTS:
            super()._broadcast_now(values, root)
            return
        try:
            self._comm.Bcast(values, root)
        except MPI.Exception as error:
            raise _translation(f"broadcast of {values.size} {values.dtype}", error) from error

    def _reduce_scatter_now(self, send: Array, recv: Array, op: str) -> None:
        if send.size > pieces.CHUNK_ELEMENTS:
            super()._reduce_scatter_now(send, recv, op)
            return
        try:
            self._comm.Reduce_scatter_block(send, recv, _OPS[op])
        except MPI.Exception as error:
            raise _translation(f"reduce_scatter of {send.size} {send.dtype}", error) from error

    def _allgather_now(self, send: Array, recv: Array) -> None:
        if recv.size > pieces.CHUNK_ELEMENTS:
            super()._allgather_now(send, recv)
            return
        try:
            self._comm.Allgather(send, recv)
        except MPI.Exception as error:
            raise _translation(f"allgather of {recv.size} {recv.dtype}", error) from error

    def _open(self) -> Entry | None:
        ranks = Ranks(self.rank, self.size, _library(), _handle(self._comm), pieces.CHUNK_ELEMENTS, _fail)
        moves = self._transport
        loops = None if moves is None else moves.loops(self._watch)
        below_bytes = 0 if moves is None else moves.always_left_bytes
        made = entry.make(ranks, loops, below_bytes, self.ledger)
        if made is not None and moves is not None:
            moves.follow(made)
        return made

    def _progress(self) -> None:
        self._comm.Iprobe(self.rank, TAG_MAX + 1)  # which is never there: libraries stop looking when they find one

    def _choose_transport(self) -> Transport:
        return choose(self, self._memory_barrier)

    def _memory_barrier(self) -> Callable[[], None]:
        """Return what the standard gives for memory that processes share (MPI 4.1, section 12.7, MPI_WIN_SYNC)."""
        node = cast("MpiCommunicator", self.node)
        window = MPI.Win.Allocate_shared(PAGE_BYTES, comm=node._comm)
        window.Lock_all(MPI.MODE_NOCHECK)
        self._windows.append(window)
        return window.Sync

    def _executor(self) -> AbstractContextManager[Executor | None]:
        if self.size == 1:
            return super()._executor()
        from mpi4py.futures import MPICommExecutor  # which registers itself to be waited for at exit

        found = MPICommExecutor(self._comm)
        return cast("AbstractContextManager[Executor | None]", found)  # its stub names the wrong class

    def _split_node(self) -> Communicator:
        part = ranks_per_node()  # first, as it may raise
        with _translated("node"):
            comm = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
            if part is not None:
                whole, comm = comm, comm.Split(comm.Get_rank() // part)
                whole.Free()
        node = self._child(comm, "node")
        assert node is not None
        return node

    def _child(self, comm: MPI.Comm, axis: str) -> MpiCommunicator | None:
        """Return the communicator over ``comm``, which was split from this one's, with the settings of this one."""
        self._splits += 1
        if comm == MPI.COMM_NULL:
            return None
        child = MpiCommunicator(
            cast("MPI.Intracomm", comm), self.ledger.child(axis), self._channel, f"{self._name}/{self._splits}",
            self._watch.chosen_s,
        )  # fmt: skip
        child._device_way = self._device_way.among(child.size)
        child.debug = self.debug
        return child

    def _new_checker(self) -> Checker:
        self._checkers += 1  # a note of one that was switched off must not be taken for one of the next
        return Checker(self._channel, f"{self._name}@{self._checkers}", self._watch.members, self.rank, self._watch)

    def abort(self, code: int = 1) -> NoReturn:
        """End all ranks of the job at once, with this exit code."""
        MPI.COMM_WORLD.Abort(code)
        raise SystemExit(code)  # for the type checker: Abort does not return

    def _free(self) -> None:
        for window in self._windows:
            window.Unlock_all()
            window.Free()
        self._comm.Free()
        if not self._name:  # that of the family, from which all others of the channel were split
            self._channel.free()


class _MpiHandle:
    """A request of MPI's, and the call whose memory it uses until it is complete.

    How it ended is kept: MPI forgets a request that is complete, failed ones too, and would say that all is well.
    """

    def __init__(self, call: Call, request: MPI.Request) -> None:
        self._call: Call | None = call
        self._request = request
        self._failure: CommunicationError | None = None

    def wait(self) -> None:
        self._look(self._request.Wait)
        if self._failure is not None:
            raise self._failure

    def test(self) -> bool:
        return self._look(self._request.Test)

    def _look(self, ask: Callable[[MPI.Status], bool]) -> bool:
        """Tell whether it is complete."""
        call = self._call
        if call is None:
            return True
        status = MPI.Status()
        try:
            with _translated(call):
                complete = ask(status)
            if complete:
                _check_length(call, status)
        except CommunicationError as error:
            complete, self._failure = True, error
        if complete:
            self._call = None
        return complete


def _check_length(call: Call, status: MPI.Status) -> None:
    """Refuse a message that is shorter than what was to be received."""
    if call.operation != "recv" or call.recv is None:
        return
    got = status.Get_elements(MPI.BYTE)  # Get_count ends at 2 GiB where the library has 32-bit counts
    if got != call.recv.nbytes:
        raise MismatchError(
            f"a message of another size came from rank {call.peer}", operation="recv", got=f"{got} bytes",
            expected=f"{call.recv.nbytes}",
        )  # fmt: skip


class _Joint:
    """The pieces of a long call under way."""

    def __init__(self, handles: list[Handle], finish: Callable[[], None]) -> None:
        self._handles = handles
        self._finish: Callable[[], None] | None = finish

    def wait(self) -> None:
        for handle in self._handles:
            handle.wait()
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()

    def test(self) -> bool:
        return all(handle.test() for handle in self._handles)


@contextmanager
def _translated(what: Call | str) -> Iterator[None]:
    """Turn an error of MPI's into one of ours that names the operation."""
    try:
        yield
    except MPI.Exception as error:
        raise _translation(what, error) from error


def _translation(what: Call | str, error: MPI.Exception) -> CommunicationError:
    said = error.Get_error_string()
    if error.Get_error_class() == MPI.ERR_TRUNCATE:
        return MismatchError(
            "another rank sent more than this one awaits", operation=str(what), got=said,
            remedy="hand in as many elements on all ranks, or give counts; MPITRAIN_DEBUG=1 names the calls",
        )  # fmt: skip
    return CommunicationError("MPI failed", operation=str(what), got=said)


def _members(comm: MPI.Intracomm, family: MPI.Group) -> list[int]:
    """Return the ranks of a communicator as those of the family that it belongs to."""
    group = comm.Get_group()
    members = group.Translate_ranks(None, family)
    group.Free()
    return list(members)


@cache
def _library() -> Library:
    """Return where compiled code finds the library: what a profiler put before it, else what mpi4py is linked to."""
    loaded, linked = ctypes.CDLL(None), ctypes.CDLL(MPI.__file__)
    functions = (
        getattr(loaded, name, None) or getattr(linked, name)
        for name in ("MPI_Allreduce", "MPI_Bcast", "MPI_Reduce_scatter_block", "MPI_Allgather")
    )
    first, second, third, fourth = (ctypes.cast(each, ctypes.c_void_p).value or 0 for each in functions)
    datatypes = {name: _handle(datatype) for name, datatype in _DATATYPES.items()}
    ops = {name: _handle(op) for name, op in _OPS.items()}
    return Library((first, second, third, fourth), int(MPI.IN_PLACE), datatypes, ops)


def _handle(of: MPI.Comm | MPI.Datatype | MPI.Op) -> int:
    """Return a handle as a signed number of 64 bits; where handles are ints, many are negative."""
    return ctypes.c_int64(MPI._handleof(of)).value


def _fail(operation: str, array: Array, code: int) -> None:
    """Raise the error of a call that compiled code made; 0: it made none, as the communicator was freed."""
    if not code:
        raise CommunicationError("the communicator was freed", operation=operation)
    raise _translation(f"{operation} of {array.size} {array.dtype}", MPI.Exception(code))


@cache
def _datatype(dtype: DType) -> MPI.Datatype:
    return _DATATYPES[dtype.name]


@cache  # for good: few sizes are so large
def _whole(dtype: DType, elements: int, chunk: int) -> MPI.Datatype:
    """Return a type of which one element is an array of more elements than a count can say."""
    one, (chunks, rest) = _datatype(dtype), divmod(elements, chunk)
    full, tail = one.Create_contiguous(chunk), one.Create_contiguous(rest)
    made = MPI.Datatype.Create_struct([chunks, 1], [0, chunks * chunk * dtype.itemsize], [full, tail])
    full.Free()
    tail.Free()
    return made.Commit()


def _spec(array: Array | None, counts: tuple[int, ...] | None = None) -> Any:
    """Return a buffer in the form that mpi4py's methods take."""
    if array is None:
        return None
    datatype = _datatype(array.dtype)
    if array.size > pieces.CHUNK_ELEMENTS:  # a message: collectives are cut before
        return [array, 1, _whole(array.dtype, array.size, pieces.CHUNK_ELEMENTS)]
    return [array, datatype] if counts is None else [array, counts, None, datatype]


def _message(call: Call, rank: int) -> tuple[str, tuple[Any, ...]]:
    """Return the method of mpi4py's that performs a call, and its arguments."""
    op = _OPS.get(call.op or "")
    ragged = "" if call.counts is None else "v"
    match call.operation:
        case "allreduce":
            return "Allreduce", (MPI.IN_PLACE, _spec(call.recv), op)
        case "reduce" if call.root == rank:
            return "Reduce", (MPI.IN_PLACE, _spec(call.recv), op, call.root)
        case "reduce":
            return "Reduce", (_spec(call.recv), None, op, call.root)
        case "broadcast":
            return "Bcast", (_spec(call.recv), call.root)
        case "reduce_scatter" if call.counts is None:
            return "Reduce_scatter_block", (_spec(call.send), _spec(call.recv), op)
        case "reduce_scatter":
            return "Reduce_scatter", (_spec(call.send), _spec(call.recv), call.counts, op)
        case "allgather":
            return f"Allgather{ragged}", (_spec(call.send), _spec(call.recv, call.counts))
        case "gather":
            return f"Gather{ragged}", (_spec(call.send), _spec(call.recv, call.counts), call.root)
        case "scatter":
            return f"Scatter{ragged}", (_spec(call.send, call.counts), _spec(call.recv), call.root)
        case "alltoall":
            return f"Alltoall{ragged}", (_spec(call.send, call.counts), _spec(call.recv, call.recv_counts))
        case "send":
            return "Send", (_spec(call.send), call.peer, call.tag)
        case "recv":
            return "Recv", (_spec(call.recv), call.peer, call.tag)
        case _:
            return "Barrier", ()
