"""NVIDIA GPUs, through CuPy.  Streams may be anybody's: work is queued on the one that the caller's library uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpitrain._errors import CommunicationError
from mpitrain._typing import Array, DType
from mpitrain.arrays.devices.stream import Beacon, Event, Stream
from mpitrain.arrays.dtypes import is_bfloat16
from mpitrain.arrays.kernels_cuda import elementwise
from mpitrain.arrays.namespace import by_device

_UFUNCS = {
    "sum": "add", "prod": "multiply", "min": "minimum", "max": "maximum", "and": "bitwise_and", "or": "bitwise_or",
}  # fmt: skip

_WIDEN = "y = __uint_as_float(((unsigned int)x) << 16)"
_NARROW = """
unsigned int bits = __float_as_uint(x);
y = isnan(x) ? (bits >> 16 & 0x8000u) | 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
"""
"""Round to the nearest bfloat16, ties to the even one, as ``ml_dtypes`` does: its bits are the upper half of a
float32's."""


@dataclass(frozen=True)
class CudaStream(Stream):
    """A stream of CuPy's, or one that CuPy was told of.

    Parameters
    ----------
    device : int
        Number of the device.
    pointer : int
        The stream, as CUDA knows it.
    handle : cupy.cuda.Stream or cupy.cuda.ExternalStream
        The same for CuPy.
    """

    device: int
    pointer: int
    handle: Any = field(compare=False)

    @classmethod
    def current(cls, device: int) -> CudaStream:
        """Return CuPy's current stream on a device."""
        handle = by_device("gpu").cuda.get_current_stream(device)
        return cls(device, handle.ptr, handle)

    @classmethod
    def external(cls, device: int, pointer: int) -> CudaStream:
        """Return a stream of another library."""
        cuda = by_device("gpu").cuda
        if hasattr(cuda.Stream, "from_external"):  # CuPy 14 and newer
            return cls(device, pointer, cuda.Stream.from_external(_Foreign(pointer)))
        return cls(device, pointer, cuda.ExternalStream(pointer, device))

    def fork(self) -> CudaStream:
        """Return a new stream, which does not wait for the default stream either."""
        cupy = by_device("gpu")
        with cupy.cuda.Device(self.device):
            handle = cupy.cuda.Stream(non_blocking=True)
        return CudaStream(self.device, handle.ptr, handle)

    def record(self) -> Event:
        """Return an event after what is queued."""
        with self._current() as cupy:
            event: Event = self.handle.record(cupy.cuda.Event(disable_timing=True))
        return event

    def wait(self, event: Event) -> None:
        """Put what is queued from now on behind an event."""
        with self._current():
            self.handle.wait_event(event)

    def synchronize(self) -> None:
        """Block until the stream is empty."""
        with self._current():
            self.handle.synchronize()

    def empty(self, elements: int, dtype: DType) -> Array:
        """Return memory of CuPy's pool, which hands it out in the order of the stream."""
        with self._current() as cupy:
            words: Array = cupy.empty(elements, dtype)
        return words

    def pinned(self, nbytes: int) -> Array:
        """Return page-locked memory of CuPy's pool."""
        with self._current() as cupy:
            memory = cupy.cuda.alloc_pinned_memory(max(nbytes, 1))
        return np.frombuffer(memory, np.uint8, nbytes)

    def share(self, nbytes: int) -> tuple[Array, bytes]:
        """Allocate apart from CuPy's pool, for the driver shares whole allocations, and only plain ones."""
        with self._sharing("shared") as cupy:
            try:
                memory = cupy.cuda.Memory(nbytes)
            except cupy.cuda.runtime.CUDARuntimeError:  # what is free may all be in the pool
                cupy.get_default_memory_pool().free_all_blocks()
                memory = cupy.cuda.Memory(nbytes)
            return _bytes(memory, nbytes), cupy.cuda.runtime.ipcGetMemHandle(memory.ptr)

    def open(self, name: bytes, nbytes: int) -> Array:
        """Map memory of a process that works on this device, or on one that this device can read."""
        with self._sharing("reached") as cupy:
            runtime = cupy.cuda.runtime
            pointer = runtime.ipcOpenMemHandle(name, runtime.cudaIpcMemLazyEnablePeerAccess)
            return _bytes(cupy.cuda.UnownedMemory(pointer, nbytes, None, self.device), nbytes)

    def close(self, opened: Array) -> None:
        """Unmap it."""
        with self._current() as cupy:
            cupy.cuda.runtime.ipcCloseMemHandle(address(opened))

    def beacon(self) -> tuple[Beacon, bytes]:
        """Make an event that other processes can open."""
        with self._sharing("shared") as cupy:
            event = cupy.cuda.Event(disable_timing=True, interprocess=True)
            return _CudaBeacon(event.ptr, event), cupy.cuda.runtime.ipcGetEventHandle(event.ptr)

    def sight(self, name: bytes) -> Beacon:
        """Open the event."""
        with self._sharing("reached") as cupy:
            return _CudaBeacon(cupy.cuda.runtime.ipcOpenEventHandle(name))

    def copy(self, values: Array, into: Array, dtype: DType) -> None:
        """Copy by CuPy's kernels."""
        with self._current():
            if values.dtype == into.dtype:
                into[...] = values
            elif is_bfloat16(dtype):
                _bfloat16(into.dtype.kind == "f")(values, into)
            elif into.dtype.kind == "f":
                into[...] = values.view(dtype)
            else:
                into.view(dtype)[...] = values

    def download(self, words: Array, into: Array) -> None:
        """Copy by the device's copy engine."""
        runtime = by_device("gpu").cuda.runtime
        self._transfer(into.ctypes.data, address(words), words.nbytes, runtime.memcpyDeviceToHost)

    def upload(self, values: Array, into: Array) -> None:
        """Copy by the device's copy engine."""
        runtime = by_device("gpu").cuda.runtime
        self._transfer(address(into), values.ctypes.data, values.nbytes, runtime.memcpyHostToDevice)

    def combine(self, op: str, left: Array, right: Array, out: Array) -> None:
        """Reduce by one kernel."""
        with self._current() as cupy:
            getattr(cupy, _UFUNCS[op])(left, right, out=out)

    def divide(self, words: Array, divisor: int) -> None:
        """Divide by one kernel."""
        with self._current() as cupy:
            cupy.divide(words, divisor, out=words)

    @contextmanager
    def _sharing(self, done: str) -> Iterator[Any]:
        """As `_current`; say what the driver refuses."""
        with self._current() as cupy:
            try:
                yield cupy
            except cupy.cuda.runtime.CUDARuntimeError as error:
                raise CommunicationError(
                    f"memory of GPUs cannot be {done} between processes", got=str(error),
                    remedy="set MPITRAIN_DEVICE_TRANSPORT=staged",
                ) from error  # fmt: skip

    def _transfer(self, to: int, of: int, nbytes: int, kind: int) -> None:
        if nbytes:
            with self._current() as cupy:
                cupy.cuda.runtime.memcpyAsync(to, of, nbytes, kind, self.pointer)

    @contextmanager
    def _current(self) -> Iterator[Any]:
        """Make device and stream CuPy's current ones: the default stream has the same number on every device."""
        cupy = by_device("gpu")
        with cupy.cuda.Device(self.device), self.handle:
            yield cupy


@dataclass(frozen=True)
class _Foreign:
    """A stream of another library, as CuPy asks for one."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@dataclass(frozen=True)
class _CudaBeacon:
    """An event of CUDA's, of this process (``owner`` keeps it) or of another."""

    pointer: int
    owner: Any = None

    def light(self, stream: Stream) -> None:
        with _of_cuda(stream)._current() as cupy:
            cupy.cuda.runtime.eventRecord(self.pointer, _of_cuda(stream).pointer)

    def close(self) -> None:
        if self.owner is None:
            by_device("gpu").cuda.runtime.eventDestroy(self.pointer)

    def follow(self, stream: Stream) -> None:
        with _of_cuda(stream)._current() as cupy:
            cupy.cuda.runtime.streamWaitEvent(_of_cuda(stream).pointer, self.pointer)


def _of_cuda(stream: Stream) -> CudaStream:
    assert isinstance(stream, CudaStream)
    return stream


def _bytes(memory: Any, nbytes: int) -> Array:
    cupy = by_device("gpu")
    words: Array = cupy.ndarray((nbytes,), np.uint8, cupy.cuda.MemoryPointer(memory, 0))
    return words


def address(words: Array) -> int:
    """Return where words begin, as CUDA counts."""
    return int(words.data.ptr)  # type: ignore[attr-defined]  # of CuPy


def _bfloat16(widens: bool) -> Callable[..., Any]:
    """Return the kernel that turns words into float32 values, or back."""
    if widens:
        return elementwise("widen", "uint16 x", "float32 y", _WIDEN)
    return elementwise("narrow", "float32 x", "uint16 y", _NARROW)
