"""Stands for CuPy and a GPU where there is none: as much of CuPy's interface as mpitrain uses, over NumPy arrays.

Work is queued on streams and takes effect as late as the program allows: when its stream, or an event behind it, is
waited for, or when work that is ordered behind it needs its place.  From the moment that something is queued, what it
will write is poison (all bits set: NaN, or −1), on the device and in page-locked memory alike; and what it will read is
read only when it takes effect.  So a missing wait shows: the host reads poison, a stream reads what another one has not
written yet, or the host writes over what a copy still needs.  Streams never wait for each other by themselves.

What one process shares with others is real shared memory, and what it does there takes effect some milliseconds later
at the earliest, unless it waits for that itself.

Memory that nobody has any more is handed out again on the stream that it was made on, while work anywhere may
still use it.  It has addresses that MPI can use, through ``__cuda_array_interface__`` as with CuPy's arrays.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import ml_dtypes
import numpy as np

_LOCK = threading.RLock()
_HERE = threading.local()
_NUMBERS = itertools.count(1000)
_STREAMS: dict[int, Stream] = {}
_KEPT: list[np.ndarray] = []
_POOLS: dict[tuple[Stream, int], list[np.ndarray]] = {}
_PINNED: list[np.ndarray] = []
_SHARED: WeakValueDictionary[int, Shared] = WeakValueDictionary()  # by address
_OPENED: dict[int, Shared] = {}
_EVENTS: dict[int, Event | PeerEvent] = {}
_LATE_S = 2e-3


class Work:
    """A kernel or copy that waits in a stream."""

    def __init__(self, kernel: Callable[..., None], out: np.ndarray, reads: Sequence[np.ndarray]) -> None:
        self.kernel, self.out, self.reads = kernel, out, reads

    def run(self) -> None:
        with np.errstate(all="ignore"):
            self.kernel(self.out, *self.reads)

    def touches(self, memory: np.ndarray) -> bool:
        return any(np.may_share_memory(memory, each) for each in (self.out, *self.reads))


class Event:
    """A place in a stream."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.stream: Stream | None = None
        self.position = 0
        self.ptr = next(_NUMBERS)
        self.clock = Clock(Shared(16)) if interprocess else None
        if interprocess:
            _EVENTS[self.ptr] = self

    def synchronize(self) -> None:
        assert self.stream is not None, "the event was never recorded"
        self.stream._run_to(self.position)

    run = synchronize  # as an item of another stream, which waits


class Shared:
    """Memory that other processes can map, of this process or of another one."""

    def __init__(self, nbytes: int, name: bytes | None = None) -> None:
        if name is None:
            self.fd = os.memfd_create("standin")
            os.ftruncate(self.fd, nbytes + 8)
            self.name = f"{os.getpid()} {self.fd} {nbytes}".encode().ljust(64)
        else:
            pid, fd, size = map(int, name.split())
            if pid == os.getpid():
                raise CUDARuntimeError("cudaErrorInvalidDevice: it is this process's own")
            self.fd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
            self.name, nbytes = name, size
        words = np.frombuffer(mmap.mmap(self.fd, nbytes + 8), np.uint8)
        self.memory, self.openers = words[:nbytes], words[nbytes:].view(np.int64)
        self.ptr = self.memory.__array_interface__["data"][0]

    def count(self, more: int) -> None:
        """Count the processes that have opened it."""
        fcntl.flock(self.fd, fcntl.LOCK_EX)
        self.openers += more
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def __del__(self) -> None:
        os.close(self.fd)


class Memory(Shared):
    """Memory of the device apart from the pool; freeing it spoils it for whoever still reads it."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        _poison(self.memory)
        _SHARED[self.ptr] = self

    def __del__(self) -> None:
        _poison(self.memory)
        openers = int(self.openers[0])
        super().__del__()
        assert not openers, f"freed while {openers} other processes have it open"


class Clock:
    """How often an event was recorded, and how often a stream came there, for all processes."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self.counts = shared, shared.memory.view(np.int64)

    def record(self, stream: Stream) -> None:
        self.counts[0] += 1
        stream._items.append(Tick(self, int(self.counts[0])))
        _later(stream)


def _later(stream: Stream) -> None:
    """Let a stream come so far after a while, for other processes wait for it."""
    late = threading.Timer(_LATE_S, stream._run_to, (len(stream._items),))
    late.daemon = True
    late.start()


class Tick:
    """A stream comes to an event that other processes wait for."""

    def __init__(self, clock: Clock, number: int) -> None:
        self.clock, self.number = clock, number

    def run(self) -> None:
        self.clock.counts[1] = self.number

    def touches(self, memory: np.ndarray) -> bool:
        return False


class PeerEvent:
    """An event of another process."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock


class Wait(Tick):
    """A stream waits for the event of another process."""

    def run(self) -> None:
        while self.clock.counts[1] < self.number:
            time.sleep(1e-5)


def ipc_open_mem_handle(name: bytes, flags: int) -> int:
    opened = Shared(0, name)
    opened.count(1)
    _SHARED[opened.ptr] = _OPENED[opened.ptr] = opened
    return opened.ptr


def ipc_close_mem_handle(pointer: int) -> None:
    _OPENED.pop(pointer).count(-1)


def ipc_open_event_handle(name: bytes) -> int:
    number = next(_NUMBERS)
    _EVENTS[number] = PeerEvent(Clock(Shared(0, name)))
    return number


def event_record(event: int, stream: int) -> None:
    clock = _EVENTS[event].clock
    assert clock is not None
    clock.record(external_stream(stream))


def stream_wait_event(stream: int, event: int, flags: int = 0) -> None:
    clock = _EVENTS[event].clock
    assert clock is not None
    external_stream(stream)._items.append(Wait(clock, int(clock.counts[0])))


class NcclError(RuntimeError):
    """As NCCL says that something failed."""


class NcclCommunicator:
    """Ranks that exchange what they hand in through shared memory; each call takes effect some milliseconds later."""

    SLOT_BYTES = 1 << 23

    def __init__(self, size: int, name: bytes, rank: int) -> None:
        self._size, self._rank, self._calls = size, rank, 0
        self._shared = _OWN.get(name) or Shared(0, name)
        words = self._shared.memory.view(np.int64)
        self._given, self._taken = words[:size], words[size : 2 * size]
        slots = self._shared.memory[4096 : 4096 + size * self.SLOT_BYTES]
        self._slots = slots.reshape(size, self.SLOT_BYTES)

    def allReduce(self, send: int, recv: int, n: int, kind: int, op: int, stream: int) -> None:  # noqa: N802
        self._queue(send, n, recv, n, kind, stream, lambda all_: _REDUCE[_NCCL[op]](all_, axis=0, dtype=all_.dtype))

    def reduce(self, send: int, recv: int, n: int, kind: int, op: int, root: int, stream: int) -> None:
        if self._rank == root:
            self.allReduce(send, recv, n, kind, op, stream)
        else:
            self._queue(send, n, recv, 0, kind, stream, lambda all_: all_[0, :0])

    def reduceScatter(self, send: int, recv: int, n: int, kind: int, op: int, stream: int) -> None:  # noqa: N802
        own = slice(self._rank * n, (self._rank + 1) * n)
        take = lambda all_: _REDUCE[_NCCL[op]](all_, axis=0, dtype=all_.dtype)[own]  # noqa: E731
        self._queue(send, n * self._size, recv, n, kind, stream, take)

    def broadcast(self, send: int, recv: int, n: int, kind: int, root: int, stream: int) -> None:
        self._queue(send, n, recv, n, kind, stream, lambda all_: all_[root])

    def allGather(self, send: int, recv: int, n: int, kind: int, stream: int) -> None:  # noqa: N802
        self._queue(send, n, recv, n * self._size, kind, stream, lambda all_: all_.reshape(-1))

    def send(self, at: int, n: int, kind: int, peer: int, stream: int) -> None:
        _HERE.sent.append((self, at, n, kind, stream))

    def recv(self, at: int, n: int, kind: int, peer: int, stream: int) -> None:
        _HERE.received.append(at)

    def exchange(self, send: int, recv: int, n: int, kind: int, stream: int) -> None:
        """All rows to all ranks, from which each takes its own."""
        own = slice(self._rank * n, (self._rank + 1) * n)
        size = self._size
        self._queue(send, n * size, recv, n * size, kind, stream, lambda all_: all_[:, own].reshape(-1))

    def destroy(self) -> None:
        self._size = 0

    def _queue(
        self, send: int, n: int, recv: int, m: int, kind: int, pointer: int, take: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        stream, dtype = external_stream(pointer), np.dtype(_NCCL[kind])
        assert self._size, "it was destroyed"
        given, into = (_at(at, count * dtype.itemsize).view(dtype) for at, count in ((send, n), (recv, m)))
        self._calls += 1
        call = self._calls

        def run(out: np.ndarray, *reads: np.ndarray) -> None:
            _until(self._taken, call - 1)
            self._slots[self._rank, : n * dtype.itemsize].view(dtype)[:] = given
            self._given[self._rank] = call
            _until(self._given, call)
            out[:] = take(self._slots[:, : n * dtype.itemsize].view(dtype))
            self._taken[self._rank] = call

        stream._items.append(Work(run, into, [given]))
        _later(stream)


_REDUCE = {"sum": np.sum, "prod": np.prod, "min": lambda a, axis, dtype: a.min(axis),
           "max": lambda a, axis, dtype: a.max(axis)}  # fmt: skip
_NCCL = ("int8", "int32", "int64", "uint8", "uint32", "uint64", "float32", "float64", *_REDUCE)
_OWN: dict[bytes, Shared] = {}


def _until(counts: np.ndarray, number: int) -> None:
    while counts.min() < number:
        time.sleep(1e-5)


def nccl_unique_id() -> bytes:
    made = Shared(4096 + 8 * NcclCommunicator.SLOT_BYTES)
    _OWN[made.name] = made
    return made.name


def group_start() -> None:
    _HERE.sent, _HERE.received = [], []


def group_end() -> None:
    group, at, n, kind, stream = _HERE.sent[0]
    group.exchange(at, _HERE.received[0], n, kind, stream)


class Stream:
    """A queue of work."""

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False) -> None:
        self.ptr = next(_NUMBERS)
        self._items: list[Any] = []
        self._done = 0
        self._outer: list[Stream] = []
        _STREAMS[self.ptr] = self

    @staticmethod
    def from_external(other: Any) -> Stream:
        return external_stream(other.__cuda_stream__()[1])

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.stream, event.position = self, len(self._items)
        return event

    def wait_event(self, event: Event) -> None:
        self._items.append(event)

    def synchronize(self) -> None:
        self._run_to(len(self._items))

    def __enter__(self) -> Stream:
        self._outer.append(get_current_stream())
        _HERE.current = self
        return self

    def __exit__(self, *_: object) -> None:
        _HERE.current = self._outer.pop()

    def put(self, kernel: Callable[..., None], out: np.ndarray, *reads: np.ndarray) -> None:
        """Queue work, and poison what it will write."""
        with _LOCK:
            if any(work.touches(out) for work in self._pending()):
                self.synchronize()
            if any(np.may_share_memory(each.memory, out) for each in _SHARED.values()):
                self.synchronize()  # others may read there what this stream is behind
            own = [each.copy() if np.may_share_memory(each, out) else each for each in reads]
            _poison(out)
            self._items.append(Work(kernel, out, own))

    def _pending(self, stop: int | None = None) -> Iterator[Work]:
        """Yield all that comes before what is queued next."""
        for item in self._items[self._done : stop]:
            if isinstance(item, Event):
                assert item.stream is not None
                yield from item.stream._pending(item.position)
            else:
                yield item

    def _run_to(self, position: int) -> None:
        with _LOCK:
            while self._done < position:
                item, self._items[self._done] = self._items[self._done], None
                self._done += 1
                item.run()


def external_stream(pointer: int, device: int = -1) -> Stream:
    return _STREAMS[pointer] if pointer else get_default_stream()


def get_default_stream() -> Stream:
    """Each thread is a rank, as if it were a process of its own."""
    if not hasattr(_HERE, "default"):
        _HERE.default = Stream()
        _HERE.default.ptr = 0
    return _HERE.default


def get_current_stream(device_id: int = -1) -> Stream:
    return getattr(_HERE, "current", None) or get_default_stream()


class Device:
    def __init__(self, number: int = 0) -> None:
        assert number == 0, "there is one"
        self.id = number

    def use(self) -> None:
        return

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        return


class ndarray:  # noqa: N801  # as CuPy calls it
    """Memory of the device, as NumPy sees what MPI would see there."""

    __array_ufunc__ = None  # NumPy must not look inside

    def __init__(self, memory: np.ndarray | tuple[int], owner: object = None, memptr: Shared | None = None) -> None:
        if memptr is not None:  # as CuPy has it: shape, dtype, memory
            memory, owner = memptr.memory, memptr
        assert isinstance(memory, np.ndarray)
        self.memory, self._owner = memory, owner
        self.dtype, self.shape, self.size, self.ndim = memory.dtype, memory.shape, memory.size, memory.ndim
        self.nbytes, self.itemsize, self.strides, self.flags = (
            memory.nbytes, memory.itemsize, memory.strides, memory.flags,
        )  # fmt: skip
        self.device = Device()
        self.data = SimpleNamespace(ptr=memory.__array_interface__["data"][0])

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        kind = self.dtype.str if self.dtype.kind in "biufc" else f"<V{self.itemsize}"
        return {
            "shape": self.shape, "typestr": kind, "data": (self.data.ptr, False), "version": 3,
            "strides": None if self.flags.c_contiguous else self.strides, "stream": get_current_stream().ptr or 1,
        }  # fmt: skip

    def view(self, dtype: Any) -> ndarray:
        return ndarray(self.memory.view(dtype), self._owner)

    def reshape(self, *shape: Any) -> ndarray:
        found = self.memory.reshape(*shape)
        assert np.may_share_memory(found, self.memory) or not self.size, "a copy, which would be a kernel"
        return ndarray(found, self._owner)

    @property
    def T(self) -> ndarray:  # noqa: N802
        return ndarray(self.memory.T, self._owner)

    def __getitem__(self, where: Any) -> ndarray:
        return ndarray(np.asarray(self.memory[where]), self._owner)

    def __setitem__(self, where: Any, values: ndarray) -> None:
        get_current_stream().put(_assign, self.memory[where], values.memory)


def _assign(out: np.ndarray, values: np.ndarray) -> None:
    np.copyto(out, values, casting="unsafe")


def _poison(memory: np.ndarray) -> None:
    memory[...] = np.frombuffer(b"\xff" * memory.itemsize, memory.dtype)[0]


def _new(shape: Any, dtype: Any) -> np.ndarray:
    memory = np.empty(shape, dtype)
    _poison(memory)
    _KEPT.append(memory)  # what is queued knows only its address
    return memory


class Block:
    """Memory of the device that goes back to where it came from."""

    def __init__(self, nbytes: int) -> None:
        self._pool = _POOLS.setdefault((get_current_stream(), nbytes), [])
        self.memory = self._pool.pop() if self._pool else _new(nbytes, np.uint8)

    def __del__(self) -> None:
        self._pool.append(self.memory)


def empty(shape: Any, dtype: Any = float) -> ndarray:
    dtype = np.dtype(dtype)
    block = Block(int(np.prod(shape)) * dtype.itemsize)
    return ndarray(block.memory.view(dtype).reshape(shape), block)


def asarray(x: Any) -> ndarray:
    """Copy from the host; or look at the memory that an object shows, once its stream has come there."""
    if isinstance(x, ndarray):
        return x
    interface = getattr(x, "__cuda_array_interface__", None)
    if interface is not None:
        if interface.get("stream"):
            _STREAMS[interface["stream"]].synchronize()
        return ndarray(np.asarray(SimpleNamespace(__array_interface__={**interface, "version": 3})))
    values = np.array(x)
    found = empty(values.shape, values.dtype)
    get_current_stream().put(_assign, found.memory, values)
    return found


def asnumpy(x: ndarray) -> np.ndarray:
    """Copy to the host, and wait for that."""
    host = np.empty(x.shape, x.dtype)
    get_current_stream().put(_assign, host, x.memory)
    get_current_stream().synchronize()
    return host


def _ufunc(name: str) -> Callable[..., ndarray]:
    function = getattr(np, name)

    def call(left: ndarray, right: Any, out: ndarray | None = None) -> ndarray:
        out = empty(left.shape, left.dtype) if out is None else out
        arrays = [left.memory, *([right.memory] if isinstance(right, ndarray) else [])]
        rest = [] if isinstance(right, ndarray) else [right]
        get_current_stream().put(lambda into, *ins: function(*ins, *rest, out=into), out.memory, *arrays)
        return out

    return call


def elementwise_kernel(ins: str, outs: str, code: str, name: str) -> Callable[[ndarray, ndarray], None]:
    kernels = {
        "mpitrain_widen": lambda out, x: _assign(out, x.view(ml_dtypes.bfloat16)),
        "mpitrain_narrow": lambda out, x: _assign(out, x.astype(ml_dtypes.bfloat16).view(np.uint16)),
    }
    return lambda x, out: get_current_stream().put(kernels[name], out.memory, x.memory)


def alloc_pinned_memory(nbytes: int) -> np.ndarray:
    memory = _new(nbytes, np.uint8)
    _PINNED.append(memory)
    return memory


def memcpy_async(to: int, of: int, nbytes: int, kind: int, stream: int) -> None:
    out, values = (_at(pointer, nbytes) for pointer in (to, of))
    host = values if kind == 1 else out
    assert any(np.may_share_memory(host, each) for each in _PINNED), "the host's side is not page-locked"
    external_stream(stream).put(_assign, out, values)


def _at(pointer: int, nbytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer))


class CUDARuntimeError(RuntimeError):
    """As CUDA says that something failed."""


def modules() -> dict[str, Any]:
    """Return what stands for CuPy, and for its module of NCCL, by name."""
    found: Any = module()
    return {"cupy": found, "cupy.cuda.nccl": found.cuda.nccl}


def module() -> ModuleType:
    """Return what stands for CuPy."""
    found: Any = ModuleType("cupy")
    found.__version__ = "14.0.0"
    found.ndarray, found.empty, found.asarray, found.asnumpy = ndarray, empty, asarray, asnumpy
    found.from_dlpack = lambda x: ndarray(x.memory)
    found.ElementwiseKernel = elementwise_kernel
    found.get_default_memory_pool = lambda: SimpleNamespace(free_all_blocks=lambda: None)
    for name in ("add", "multiply", "minimum", "maximum", "bitwise_and", "bitwise_or", "divide"):
        setattr(found, name, _ufunc(name))
    runtime = SimpleNamespace(
        memcpyAsync=memcpy_async, memcpyHostToDevice=1, memcpyDeviceToHost=2, CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=lambda: 1,
        getDeviceProperties=lambda index: {"name": b"stand-in", "uuid": str(os.getpid()).encode()},
        runtimeGetVersion=lambda: 13000, driverGetVersion=lambda: 13000,
        ipcGetMemHandle=lambda ptr: _SHARED[ptr].name, ipcOpenMemHandle=ipc_open_mem_handle,
        ipcCloseMemHandle=ipc_close_mem_handle, cudaIpcMemLazyEnablePeerAccess=1, eventRecord=event_record,
        ipcGetEventHandle=lambda event: _EVENTS[event].clock.shared.name, ipcOpenEventHandle=ipc_open_event_handle,
        streamWaitEvent=stream_wait_event, eventDestroy=_EVENTS.pop,
    )  # fmt: skip
    nccl = SimpleNamespace(
        available=True, NcclCommunicator=NcclCommunicator, NcclError=NcclError, get_unique_id=nccl_unique_id,
        groupStart=group_start, groupEnd=group_end,
        **{f"NCCL_{name.upper()}": number for number, name in enumerate(_NCCL)},
    )  # fmt: skip
    found.cuda = SimpleNamespace(
        Stream=Stream, Event=Event, Device=Device, runtime=runtime,
        get_current_stream=get_current_stream, alloc_pinned_memory=alloc_pinned_memory,
        nccl=nccl, Memory=Memory, MemoryPointer=lambda memory, offset: memory,
        UnownedMemory=lambda ptr, nbytes, owner, device: _SHARED[ptr],
    )  # fmt: skip
    return found


def forget() -> None:
    """Release all memory; nothing may be queued any more."""
    _KEPT.clear()
    _POOLS.clear()
    _PINNED.clear()
    _STREAMS.clear()
    _EVENTS.clear()
    _OPENED.clear()
    _OWN.clear()
