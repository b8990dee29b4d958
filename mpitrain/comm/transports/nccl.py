"""NVIDIA's collectives between GPUs, one for each rank; what NCCL has not goes another way."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mpitrain._errors import InputError, MpitrainError
from mpitrain.arrays.devices import Stream
from mpitrain.arrays.devices.nccl import NcclGroup, can_reduce, identity, unique_id
from mpitrain.comm.buffers import behind
from mpitrain.comm.calls import Call
from mpitrain.comm.transports.device import DeviceTransport, PartialTransport, one_gpu

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

_REDUCTIONS = ("allreduce", "reduce", "reduce_scatter")
_OTHERS = ("broadcast", "allgather", "alltoall")


class NcclTransport(PartialTransport):
    """NCCL's own collectives, each behind a meeting of the hosts."""

    name: ClassVar[str] = "nccl"

    def __init__(self, comm: Communicator, rest: DeviceTransport) -> None:
        super().__init__(comm, rest)
        self._group: NcclGroup | None = None

    def release(self) -> None:
        """Leave NCCL.  Collective."""
        if self._group is not None:
            self._group.close()
            self._group = None
        super().release()

    def _takes(self, call: Call) -> bool:
        equal = call.counts is None and call.recv_counts is None
        return equal and (call.operation in _OTHERS or self._reduces(call))

    def _perform(self, call: Call, stream: Stream) -> None:
        group = self._open(call.operation, stream)
        self._meet()
        if any(side is not None and side.size for side in (call.send, call.recv)):
            with behind(stream, group.stream):
                self._queue(group, call)

    def _reduces(self, call: Call) -> bool:
        """Tell whether NCCL has the reduction, of the words that travel."""
        return (
            call.operation in _REDUCTIONS
            and call.recv is not None
            and call.op is not None
            and can_reduce(call.recv.dtype, call.op)
        )

    def _open(self, operation: str, stream: Stream) -> NcclGroup:
        """Return the group, made at the first use."""
        if self._group is None:
            with self._comm._aside():
                self._group = self._gathered(stream)
        one_gpu(operation, self._group.stream, stream)
        return self._group

    def _gathered(self, stream: Stream) -> NcclGroup:
        comm, problem, name = self._comm, "", b""
        try:
            name = unique_id()
        except MpitrainError as error:
            problem = str(error)
        told = comm.allgather_object((problem, identity(stream), name))
        found = next((each for each, _, _ in told if each), "") or _shared_gpu([gpu for _, gpu, _ in told])
        if found:
            raise InputError(
                "NCCL cannot be used", operation="nccl", got=found, remedy="set MPITRAIN_DEVICE_TRANSPORT=staged"
            )
        return NcclGroup(stream, comm.rank, comm.size, told[0][2])

    def _queue(self, group: NcclGroup, call: Call) -> None:
        send, recv = call.send, call.recv
        assert recv is not None
        match call.operation:
            case "allreduce":
                group.allreduce(recv, call.op or "")
            case "reduce":
                group.reduce(recv, call.op or "", call.root or 0)
            case "broadcast":
                group.broadcast(recv, call.root or 0)
            case _ if send is None:
                raise AssertionError(call.operation)
            case "reduce_scatter":
                group.reduce_scatter(send, recv, call.op or "")
            case "allgather":
                group.allgather(send, recv)
            case "alltoall":
                group.alltoall(send, recv, self._comm.size)


def _shared_gpu(gpus: list[bytes]) -> str:
    """Say which ranks work on the same GPU; empty if none do."""
    for rank, gpu in enumerate(gpus):
        first = gpus.index(gpu)
        if first < rank:
            return f"ranks {first} and {rank} are on the same GPU, and NCCL wants one for each"
    return ""
