"""NVIDIA's collectives between GPUs, one for each rank; what NCCL has not goes another way."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mpitrain._errors import CommunicationError
from mpitrain.arrays.devices import Stream
from mpitrain.arrays.devices.nccl import NcclGroup, can_reduce, identity, unique_id
from mpitrain.comm.buffers import behind
from mpitrain.comm.calls import Call
from mpitrain.comm.guard import agree
from mpitrain.comm.transports.device import DeviceTransport, PartialTransport, one_gpu

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

_REDUCTIONS = ("allreduce", "reduce", "reduce_scatter")
_OTHERS = ("broadcast", "allgather", "alltoall")


class NcclTransport(PartialTransport):
    """NCCL's own collectives, each behind a meeting of the hosts."""

    name: ClassVar[str] = "nccl"

    def __init__(self, comm: Communicator, rest: DeviceTransport, insists: bool = True) -> None:
        super().__init__(comm, rest, insists)
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

    def _open(self, call: Call, stream: Stream) -> None:
        """Make the group at the first use, of ranks that have a GPU each."""
        if self._group is not None:
            one_gpu(call.operation, self._group.stream, stream)
            return
        with self._comm._aside():
            self._group = self._gathered(self._meetings(), stream)

    def _gathered(self, comm: Communicator, stream: Stream) -> NcclGroup:
        with agree(comm):
            name = unique_id() if comm.rank == 0 else b""
            gpu = identity(stream)
        told = comm.allgather_object((gpu, name))
        shared = _shared_gpu([each for each, _ in told])
        if shared:
            raise CommunicationError(
                "NCCL cannot be used", operation="nccl", got=shared, remedy="set MPITRAIN_DEVICE_TRANSPORT=staged"
            )
        with agree(comm):
            return NcclGroup(stream, comm.rank, comm.size, told[0][1])

    def _perform(self, call: Call, stream: Stream) -> None:
        assert self._group is not None
        self._meetings()._run(Call("barrier"))  # who does not come is told by the watchdog, not by a silent device
        if any(side is not None and side.size for side in (call.send, call.recv)):
            with behind(stream, self._group.stream):
                self._queue(self._group, call)

    def _reduces(self, call: Call) -> bool:
        """Tell whether NCCL has the reduction, of the words that travel."""
        return (
            call.operation in _REDUCTIONS
            and call.recv is not None
            and call.op is not None
            and can_reduce(call.recv.dtype, call.op)
        )

    def _queue(self, group: NcclGroup, call: Call) -> None:
        send, recv, op, root = call.send, call.recv, call.op, call.root
        assert recv is not None
        if call.operation == "broadcast":
            assert root is not None
            group.broadcast(recv, root)
        elif call.operation == "allreduce":
            assert op is not None
            group.allreduce(recv, op)
        elif call.operation == "reduce":
            assert op is not None
            assert root is not None
            group.reduce(recv, op, root)
        else:
            assert send is not None
            if op is not None:
                group.reduce_scatter(send, recv, op)
            elif call.operation == "allgather":
                group.allgather(send, recv)
            else:
                group.alltoall(send, recv, self._comm.size)


def _shared_gpu(gpus: list[bytes]) -> str:
    """Say which ranks work on the same GPU; empty if none do."""
    for rank, gpu in enumerate(gpus):
        first = gpus.index(gpu)
        if first < rank:
            return f"ranks {first} and {rank} are on the same GPU, and NCCL wants one for each"
    return ""
