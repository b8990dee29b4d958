"""NVIDIA's library of collectives between GPUs, through CuPy's binding: one GPU for each rank."""

from __future__ import annotations

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
    return bytes(_nccl().get_unique_id())


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
        cuda = by_device("gpu").cuda
        with cuda.Device(stream.device):
            try:
                self._group = _nccl().NcclCommunicator(size, name, rank)
            except _nccl().NcclError as error:
                raise CommunicationError(
                    "NCCL does not start", got=str(error), remedy="NCCL_DEBUG=WARN tells more"
                ) from error

    def allreduce(self, words: Array, op: str) -> None:
        """Reduce in place."""
        at = address(words)
        self._group.allReduce(at, at, words.size, _type(words.dtype), _op(op), self.stream.pointer)

    def reduce(self, words: Array, op: str, root: int) -> None:
        """Reduce in place, on the root."""
        at = address(words)
        self._group.reduce(at, at, words.size, _type(words.dtype), _op(op), root, self.stream.pointer)

    def reduce_scatter(self, send: Array, recv: Array, op: str) -> None:
        """Reduce as many shares of equal size as there are ranks, one for each."""
        to = address(recv)
        self._group.reduceScatter(address(send), to, recv.size, _type(recv.dtype), _op(op), self.stream.pointer)

    def broadcast(self, words: Array, root: int) -> None:
        """Give the root's words to all."""
        at = address(words)
        self._group.broadcast(at, at, words.nbytes, _bytes(), root, self.stream.pointer)

    def allgather(self, send: Array, recv: Array) -> None:
        """Collect words of equal size."""
        self._group.allGather(address(send), address(recv), send.nbytes, _bytes(), self.stream.pointer)

    def alltoall(self, send: Array, recv: Array, size: int) -> None:
        """Exchange shares of equal size."""
        share, pointer = send.nbytes // size, self.stream.pointer
        _nccl().groupStart()
        for peer in range(size):
            self._group.send(address(send) + peer * share, share, _bytes(), peer, pointer)
            self._group.recv(address(recv) + peer * share, share, _bytes(), peer, pointer)
        _nccl().groupEnd()

    def close(self) -> None:
        """Release it, once all that is queued is done."""
        self.stream.synchronize()
        self._group.destroy()


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
