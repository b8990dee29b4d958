"""NVIDIA's library of collectives between GPUs, through CuPy's binding: one GPU for each rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np

from mpitrain._errors import CommunicationError, MissingExtraError
from mpitrain._typing import Array, DType
from mpitrain.arrays.devices.cuda import CudaStream, address
from mpitrain.arrays.devices.stream import Stream
from mpitrain.arrays.namespace import by_device

_TYPES = {
    "int8": "INT8", "int32": "INT32", "int64": "INT64", "uint8": "UINT8", "uint32": "UINT32", "uint64": "UINT64",
    "float32": "FLOAT32", "float64": "FLOAT64",
}  # fmt: skip
_OPS = {"sum": "SUM", "prod": "PROD", "min": "MIN", "max": "MAX"}


def can_reduce(dtype: DType, op: str) -> bool:
    """Tell whether NCCL has a reduction."""
    return dtype.name in _TYPES and op in _OPS


def unique_id() -> bytes:
    """Return the name by which the ranks of a new group find each other; one of them makes it.

    Raises
    ------
    MissingExtraError
        CuPy finds no NCCL.
    """
    nccl = _nccl()
    with _translated():
        return bytes(byte & 0xFF for byte in nccl.get_unique_id())


def identity(stream: Stream) -> bytes:
    """Return what tells a stream's GPU from all others."""
    assert isinstance(stream, CudaStream)
    return bytes(by_device("gpu").cuda.runtime.getDeviceProperties(stream.device)["uuid"])


class NcclGroup:
    """One rank of a group.

    Parameters
    ----------
    stream : Stream
        Any of the rank's GPU.
    rank, size : int
    name : bytes
        From `unique_id`, the same on all ranks.

    Attributes
    ----------
    stream : Stream
        Where all is queued, in the same order on all ranks.

    Notes
    -----
    Collective, as is every method.  Arrays are words of the GPU's.
    """

    def __init__(self, stream: Stream, rank: int, size: int, name: bytes) -> None:
        assert isinstance(stream, CudaStream)
        self.stream = stream.fork()
        self._gpu = by_device("gpu").cuda.Device(stream.device)
        with self._gpu, _translated():
            self._group = _nccl().NcclCommunicator(size, _as_cupy_wants_it(name), rank)

    def allreduce(self, words: Array, op: str) -> None:
        """Reduce in place."""
        self._queue("allReduce", words, words, words.size, _type(words.dtype), _op(op))

    def reduce(self, words: Array, op: str, root: int) -> None:
        """Reduce in place, on the root."""
        self._queue("reduce", words, words, words.size, _type(words.dtype), _op(op), root)

    def reduce_scatter(self, send: Array, recv: Array, op: str) -> None:
        """Reduce as many shares of equal size as there are ranks, one for each."""
        self._queue("reduceScatter", send, recv, recv.size, _type(recv.dtype), _op(op))

    def broadcast(self, words: Array, root: int) -> None:
        """Give the root's words to all."""
        self._queue("broadcast", words, words, words.nbytes, _bytes(), root)

    def allgather(self, send: Array, recv: Array) -> None:
        """Collect words of equal size."""
        self._queue("allGather", send, recv, send.nbytes, _bytes())

    def alltoall(self, send: Array, recv: Array, size: int) -> None:
        """Exchange shares of equal size."""
        share = send.size // size
        _nccl().groupStart()
        try:
            for peer in range(size):
                part = slice(peer * share, (peer + 1) * share)
                self._queue("send", send[part], send[part].nbytes, _bytes(), peer)
                self._queue("recv", recv[part], recv[part].nbytes, _bytes(), peer)
        finally:
            with self._gpu, _translated():
                _nccl().groupEnd()

    def close(self) -> None:
        """Release it, once all that is queued is done."""
        self.stream.synchronize()
        self._group.destroy()

    def _queue(self, name: str, *arguments: Array | int) -> None:
        """Call a function of NCCL's, with addresses of words, and the stream."""
        given = [each if isinstance(each, int) else address(each) for each in arguments]
        with self._gpu, _translated():
            getattr(self._group, name)(*given, self.stream.pointer)


@contextmanager
def _translated() -> Iterator[None]:
    """Say what NCCL refuses."""
    try:
        yield
    except _nccl().NcclError as error:
        raise CommunicationError(
            "NCCL failed", got=str(error),
            remedy="look at what NCCL_DEBUG=WARN tells, or set MPITRAIN_DEVICE_TRANSPORT=staged",
        ) from error  # fmt: skip


def _as_cupy_wants_it(name: bytes) -> bytes | tuple[int, ...]:
    """Return a name as it is from CuPy 14 on, and as signed numbers before."""
    major = int(by_device("gpu").__version__.partition(".")[0])
    return name if major >= 14 else tuple(np.frombuffer(name, np.int8).tolist())


def _nccl() -> Any:
    by_device("gpu")  # which says what to do where there is no CuPy
    nccl = import_module("cupy.cuda.nccl")
    if not nccl.available:
        raise MissingExtraError("CuPy finds no NCCL", remedy="pip install nvidia-nccl-cu13 (or -cu12)")
    return nccl


def _type(dtype: DType) -> int:
    return getattr(_nccl(), f"NCCL_{_TYPES[dtype.name]}")  # type: ignore[no-any-return]


def _bytes() -> int:
    return _type(np.dtype(np.uint8))


def _op(op: str) -> int:
    return getattr(_nccl(), f"NCCL_{_OPS[op]}")  # type: ignore[no-any-return]
