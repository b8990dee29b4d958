"""Arrays on a device: over a stand-in for CuPy that shows every missing wait, between threads and under ``mpiexec``."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import device_suite
import numpy as np
import pytest
import standin_cupy
import traces
from array_kinds import Kind
from conformance import folded
from device_suite import late, own, same
from test_comm_any_array import CHECKS

import mpitrain
from mpitrain._errors import CommunicationError, InputError, MismatchError, MissingExtraError
from mpitrain.arrays import libraries
from mpitrain.arrays.devices import nccl
from mpitrain.arrays.devices.cuda import CudaStream
from mpitrain.arrays.libraries.cuda_arrays import CupyArrays
from mpitrain.arrays.libraries.library import Operand
from mpitrain.comm import Communicator, LocalWorld, pieces, trace
from mpitrain.comm.buffers import staging
from mpitrain.comm.calls import Call
from mpitrain.comm.transports import device_choice, ipc
from mpitrain.comm.transports.device import one_gpu
from mpitrain.comm.transports.device_choice import Way
from mpitrain.comm.transports.shared import SMALLEST_BYTES

WINDOW_BYTES = {"WINDOW_BYTES": 256, "LEAST_BYTES": 64, "SHORT_BYTES": 64}
"""To which the suite lowers what goes through a window at a time, at least, and what is folded whole."""

OWN = {"cuda_aware": "doubling", "ipc": "ipc", "nccl": "nccl"}
"""As what debug mode shows the way of a short sum."""

STANDIN = Kind("stand-in", standin_cupy.asarray, standin_cupy.asnumpy, lambda: standin_cupy.ndarray)

ANY_ARRAY = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
DEVICE = pytest.mark.parametrize("check", device_suite.CHECKS, ids=lambda check: check.__name__)


@pytest.fixture(autouse=True)
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    modules = standin_cupy.modules()
    for name, each in modules.items():
        monkeypatch.setitem(sys.modules, name, each)
    monkeypatch.setattr(staging, "CHUNK_BYTES", device_suite.CHUNK_BYTES)
    for name in ("WINDOW_BYTES", "LEAST_BYTES", "SHORT_BYTES"):
        monkeypatch.setattr(ipc, name, WINDOW_BYTES[name])
    yield modules["cupy"]
    standin_cupy.forget()


def on_streams(check: Callable[[Communicator, Any], None], comm: Communicator, cupy: Any) -> None:
    """Run a check on the default stream, and on one that waits for no other."""
    check(comm, cupy)
    with cupy.cuda.Stream(non_blocking=True):
        check(comm, cupy)


@pytest.mark.parametrize("size", [1, 2, 3])
@ANY_ARRAY
def test_any_array_between_threads(check: Callable[[Communicator, Kind], None], size: int) -> None:
    LocalWorld(size, timeout_s=20).run(check, STANDIN)


@pytest.mark.parametrize("size", [1, 2, 3])
@DEVICE
def test_between_threads(check: Callable[[Communicator, Any], None], size: int, cupy: Any) -> None:
    if size == 1 or "debug" not in check.__name__:  # ranks that are threads always check
        LocalWorld(size, timeout_s=20).run(lambda comm: on_streams(check, comm, cupy))


class Tensor:
    """An array of a library that has a current stream of its own, as PyTorch has."""

    def __init__(self, array: Any) -> None:
        self.array = array


class Tensors(CupyArrays):
    """That library."""

    name = "tensors"

    def __init__(self) -> None:
        self.here = threading.local()

    def owns(self, x: object) -> bool:
        return isinstance(x, Tensor)

    def open(self, operation: str, x: Any) -> Operand:
        return self._operand(x, x.array)

    def stream(self, x: Any) -> CudaStream:
        return CudaStream.external(0, self.here.stream.ptr)

    def wrap(self, memory: Any, dtype: Any, like: Any) -> Tensor:
        return Tensor(memory.view(dtype))


def test_libraries_with_streams_of_their_own(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = Tensors()
    monkeypatch.setattr(libraries, "LIBRARIES", (tensors, *libraries.LIBRARIES))

    def run(comm: Communicator) -> None:
        tensors.here.stream = cupy.cuda.Stream()
        expected = folded(comm.size, (33,), "float32", "sum")
        for order in ("at", "ta"):
            x, y = own(comm, 33, "float32"), own(comm, 33, "float32")
            with tensors.here.stream:
                tensor = Tensor(late(cupy, x))
            given = {order[0]: tensor, order[1]: late(cupy, y)}
            found = comm.allreduce(given)
            same(cupy, found[order[1]], expected)
            with tensors.here.stream:
                same(cupy, found[order[0]].array, expected)
            assert comm.allreduce([tensor], out=[tensor]) == [tensor]
            with tensors.here.stream:
                same(cupy, tensor.array, expected)

    LocalWorld(2).run(run)


def test_the_table_chooses_for_a_chunk(cupy: Any) -> None:
    seen: list[str] = []

    def choose(operation: str, nbytes: int, ranks: int) -> str:
        seen.append(f"{operation} {nbytes}")
        return "ring"

    def run(comm: Communicator) -> None:
        comm.tuning = SimpleNamespace(choose=choose)  # type: ignore[assignment]
        expected = folded(2, (33,), "float32", "sum")
        same(cupy, comm.allreduce(late(cupy, own(comm, 33, "float32"))), expected)
        rings = comm.ledger.snapshot()["world", "allreduce"].moved_messages
        same(cupy, comm.allreduce(late(cupy, own(comm, 33, "float32")), algorithm="default"), expected)
        assert comm.ledger.snapshot()["world", "allreduce"].moved_messages == rings > 0

    LocalWorld(2).run(run)
    assert set(seen) == {"allreduce 44"}


def test_a_host_array_beside_a_long_device_array_is_told(cupy: Any) -> None:
    def run(comm: Communicator) -> None:
        x = own(comm, 33, "float32")
        comm.allreduce(late(cupy, x) if comm.rank else x)

    with pytest.raises(MismatchError, match=r"float32\[16\]"):
        LocalWorld(2).run(run)


@pytest.mark.parametrize("size", [1, 2])
def test_the_memory_of_one_rank_alone_stays_on_its_device(
    cupy: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    moved: list[int] = []
    take = staging.Staging.take
    monkeypatch.setattr(staging.Staging, "take", lambda self, nbytes: (moved.append(nbytes), take(self, nbytes))[1])

    def run(comm: Communicator) -> str:
        x = own(comm, 2 * comm.size, "float32")
        same(cupy, comm.allreduce(late(cupy, x)), folded(comm.size, x.shape, "float32", "sum"))
        for call in (comm.broadcast, comm.allgather, comm.alltoall, comm.reduce_scatter, comm.gather, comm.scatter):
            call(late(cupy, x.reshape(comm.size, 2)))
        return comm.device_transport

    found = LocalWorld(size, timeout_s=20).run(run)
    assert (found, bool(moved)) == ((["alone"], False) if size == 1 else (["staged"] * 2, True))


@pytest.mark.mpi
@pytest.mark.parametrize("asked", [None, "staged"])
def test_a_part_of_one_rank_is_alone_unless_a_way_was_asked_for(
    cupy: Any, asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpi4py import MPI

    if asked is not None:
        monkeypatch.setenv("MPITRAIN_DEVICE_TRANSPORT", asked)
    with Communicator.from_mpi(MPI.COMM_WORLD) as world, world.split(world.rank) as part:  # type: ignore[union-attr]
        assert world.device_transport == ("staged" if asked or world.size > 1 else "alone")
        assert part.device_transport == (asked or "alone")
        x = own(world, 33, "float32")
        same(cupy, part.allreduce(late(cupy, x)), x)
        same(cupy, part.iallreduce(late(cupy, x)).wait(), x)


@pytest.fixture(params=["staged", "cuda_aware", "ipc", "nccl"])
def comm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Communicator]:
    """The world, with each transport of device memory."""
    from mpi4py import MPI

    monkeypatch.setenv("MPITRAIN_DEVICE_TRANSPORT", request.param)
    with Communicator.from_mpi(MPI.COMM_WORLD) as made:
        assert made.device_transport == made.node.device_transport == request.param
        assert made.device_transport_reason == f"MPITRAIN_DEVICE_TRANSPORT={request.param}"
        yield made


@pytest.mark.mpi
@pytest.mark.slow
@ANY_ARRAY
def test_any_array_over_mpi(check: Callable[[Communicator, Kind], None], comm: Communicator) -> None:
    if "different" not in check.__name__ or comm.device_transport == "staged":
        check(comm, STANDIN)


@pytest.mark.mpi
@DEVICE
def test_over_mpi(check: Callable[[Communicator, Any], None], comm: Communicator, cupy: Any) -> None:
    on_streams(check, comm, cupy)


@pytest.mark.mpi
def test_a_host_array_is_told_from_one_that_the_device_reduces(comm: Communicator, cupy: Any) -> None:
    if comm.size == 1 or comm.device_transport == "staged":
        return
    comm.debug = True
    x = own(comm, 5, "float32")
    with pytest.raises(MismatchError, match=f"algorithm={OWN.get(comm.device_transport)}"):
        comm.allreduce(late(cupy, x) if comm.rank else x)
    comm.debug = False
    got = comm.allreduce(late(cupy, x) if comm.rank else x, algorithm="doubling")  # which both sides can perform
    assert np.array_equal(cupy.asnumpy(got) if comm.rank else got, folded(comm.size, (5,), "float32", "sum"))


@pytest.mark.mpi
def test_what_the_library_gets_to_see(comm: Communicator, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staged: no memory of a device at all.  Else: never in a reduction, and never in a nonblocking collective."""
    seen: dict[str, set[str]] = {"_run": set(), "_begin": set()}

    def spy(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def spied(self: Communicator, call: Call) -> Any:
            if isinstance(call.send, standin_cupy.ndarray) or isinstance(call.recv, standin_cupy.ndarray):
                seen[name].add(call.operation)
            return original(self, call)

        return spied

    for name in seen:
        monkeypatch.setattr(type(comm), name, spy(name, getattr(type(comm), name)))
    for each in device_suite.CHECKS:
        each(comm, cupy)
    if comm.device_transport != "cuda_aware":
        assert seen == {"_run": set(), "_begin": set()}
    else:
        moves = {"broadcast", "allgather", "gather", "scatter", "alltoall"}
        assert seen["_run"] - {"send", "recv"} == moves
        assert seen["_begin"] - {"send", "recv"} == set()


@pytest.mark.mpi
def test_more_elements_than_the_library_counts(comm: Communicator, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", 16)
    device_suite.exchanges(comm, cupy)
    device_suite.every_algorithm(comm, cupy)


@pytest.mark.mpi
def test_large_chunks_pass_through_shared_memory(
    comm: Communicator, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(staging, "CHUNK_BYTES", 4 * SMALLEST_BYTES)
    n = 9 * SMALLEST_BYTES // 4 + 3
    same(cupy, comm.allreduce(late(cupy, own(comm, n, "float32"))), folded(comm.size, (n,), "float32", "sum"))


def refuse(*_: object) -> None:
    raise standin_cupy.CUDARuntimeError("no such thing")


def of(cupy: Any, function: str) -> tuple[Any, str]:
    """A function of CUDA's, as ``monkeypatch`` wants it."""
    return (cupy.cuda if function == "Memory" else cupy.cuda.runtime), function


@pytest.mark.mpi
@pytest.mark.parametrize("function", ["Memory", "ipcGetMemHandle", "ipcOpenMemHandle", "ipcOpenEventHandle"])
def test_memory_that_one_rank_cannot_share_or_reach_is_an_error_on_all(
    function: str, cupy: Any, monkeypatch: pytest.MonkeyPatch, world: Communicator
) -> None:
    from mpi4py import MPI

    before = getattr(*of(cupy, function))
    monkeypatch.setenv("MPITRAIN_DEVICE_TRANSPORT", "ipc")
    with Communicator.from_mpi(MPI.COMM_WORLD) as comm:
        same(cupy, comm.allreduce(late(cupy, own(comm, 5, "float32"))), folded(comm.size, (5,), "float32", "sum"))
        if world.rank == 0:
            monkeypatch.setattr(*of(cupy, function), refuse)
        if comm.size > 1:
            with pytest.raises(CommunicationError, match=r"memory of GPUs cannot be .*; got no such thing; .*=staged"):
                comm.allreduce(late(cupy, own(comm, 113, "float32")))  # for which the window is too short
        if world.rank == 0:
            monkeypatch.setattr(*of(cupy, function), before)
        same(cupy, comm.allreduce(late(cupy, own(comm, 5, "float32"))), folded(comm.size, (5,), "float32", "sum"))


def test_memory_that_the_pool_keeps_is_asked_for(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ["all of the GPU's"]
    pool = SimpleNamespace(free_all_blocks=kept.clear)
    monkeypatch.setattr(cupy, "get_default_memory_pool", lambda: pool)
    monkeypatch.setattr(cupy.cuda, "Memory", lambda nbytes: refuse() if kept else standin_cupy.Memory(nbytes))
    words, _ = CudaStream.current(0).share(64)
    assert words.nbytes == 64


@pytest.mark.mpi
def test_nccl_wants_a_gpu_for_each_rank(cupy: Any, monkeypatch: pytest.MonkeyPatch, world: Communicator) -> None:
    from mpi4py import MPI

    monkeypatch.setenv("MPITRAIN_DEVICE_TRANSPORT", "nccl")
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceProperties", lambda index: {"uuid": b"the only one"})
    with Communicator.from_mpi(MPI.COMM_WORLD) as comm:
        if comm.size > 1:
            with pytest.raises(CommunicationError, match="ranks 0 and 1 are on the same GPU"):
                comm.allreduce(late(cupy, own(comm, 5, "float32")))


@pytest.mark.mpi
@pytest.mark.parametrize("function", ["getDeviceProperties", "ipcOpenMemHandle"])
def test_what_was_probed_and_yet_cannot_be_opened_is_given_up(
    function: str, cupy: Any, monkeypatch: pytest.MonkeyPatch, world: Communicator
) -> None:
    from mpi4py import MPI

    monkeypatch.delenv("MPITRAIN_DEVICE_TRANSPORT", raising=False)
    monkeypatch.setattr(device_choice.probing, "setting", lambda library: None)
    monkeypatch.setattr(device_choice, "choose", lambda library: Way(("nccl", "ipc", "staged"), "probed", True))
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceProperties", lambda index: {"uuid": b"the only one"})
    if function == "ipcOpenMemHandle" and world.rank == 0:
        monkeypatch.setattr(cupy.cuda.runtime, function, refuse)
    left = "staged" if function == "ipcOpenMemHandle" else "ipc"
    with Communicator.from_mpi(MPI.COMM_WORLD) as comm:
        assert comm.device_transport == ("nccl" if comm.size > 1 else "alone")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for n in (5, 113):
                found = comm.allreduce(late(cupy, own(comm, n, "float32")))
                same(cupy, found, folded(comm.size, (n,), "float32", "sum"))
        if comm.size > 1:
            assert comm.device_transport == left
            assert "probed; nccl: nccl: NCCL cannot be used; got ranks 0 and 1" in comm.device_transport_reason
            said = [str(each.message).partition(",")[0] for each in told]
            expected = ["ipc is used instead of nccl", "staged is used instead of ipc"]
            assert said == (expected[: 2 - (left == "ipc")] if comm.rank == 0 else [])


@pytest.mark.mpi
def test_ipc_is_for_one_node(cupy: Any, monkeypatch: pytest.MonkeyPatch, world: Communicator) -> None:
    from mpi4py import MPI

    monkeypatch.setenv("MPITRAIN_RANKS_PER_NODE", "1")
    monkeypatch.setenv("MPITRAIN_DEVICE_TRANSPORT", "ipc")
    with Communicator.from_mpi(MPI.COMM_WORLD) as comm:
        assert comm.device_transport == ("staged" if comm.size > 1 else "ipc")
        assert ("on several nodes" in comm.device_transport_reason) == (comm.size > 1)
        assert comm.node.device_transport == "ipc"
        same(cupy, comm.allreduce(late(cupy, own(comm, 5, "float32"))), folded(comm.size, (5,), "float32", "sum"))


@pytest.mark.parametrize("version", ["13.6.0", "14.2.0"])
def test_names_of_nccl_in_both_forms(version: str, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (-56, 0, 127) if version < "14" else bytes([200, 0, 127])
    monkeypatch.setattr(cupy, "__version__", version)
    monkeypatch.setattr(cupy.cuda.nccl, "get_unique_id", lambda: given)
    name = nccl.unique_id()
    assert name == bytes([200, 0, 127])
    assert nccl._as_cupy_wants_it(name) == given


def test_nccl_that_is_not_there_or_fails_says_what_to_do(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise standin_cupy.NcclError("unhandled system error")

    monkeypatch.setattr(cupy.cuda.nccl, "get_unique_id", fail)
    with pytest.raises(CommunicationError, match="NCCL failed; got unhandled system error; look at what NCCL_DEBUG"):
        nccl.unique_id()
    monkeypatch.setattr(cupy.cuda.nccl, "available", False)
    with pytest.raises(MissingExtraError, match="CuPy finds no NCCL; pip install nvidia-nccl"):
        nccl.unique_id()


def test_arrays_of_one_rank_on_several_gpus_are_refused() -> None:
    first, second = CudaStream(0, 0, None), CudaStream(1, 0, None)
    one_gpu("allreduce", first, first)
    with pytest.raises(InputError, match="allreduce: arrays of one rank are on several GPUs; got GPU 1 after GPU 0"):
        one_gpu("allreduce", first, second)


def test_streams_of_other_libraries_in_older_versions_of_cupy(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = cupy.cuda.Stream()
    assert CudaStream.external(0, stream.ptr).handle is stream
    monkeypatch.delattr(standin_cupy.Stream, "from_external")
    cupy.cuda.ExternalStream = standin_cupy.external_stream
    assert CudaStream.external(0, stream.ptr).handle is stream


@pytest.mark.mpi
def test_an_unknown_transport_is_refused_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpi4py import MPI

    if MPI.COMM_WORLD.Get_rank() == 0:  # the others do as rank 0 says
        monkeypatch.setenv("MPITRAIN_DEVICE_TRANSPORT", "pigeon")
    with pytest.raises(InputError, match="MPITRAIN_DEVICE_TRANSPORT: unknown transport; got pigeon; expected staged"):
        Communicator.from_mpi(MPI.COMM_WORLD)


def test_memory_is_not_given_up_while_a_copy_uses_it(cupy: Any) -> None:
    copies, words = staging.Staging(CudaStream.current(0)), cupy.empty(3, "float32")
    slot = copies.take(12)
    slot.words(3, words.dtype)[...] = [1, 2, 3]
    copies.upload(slot, words)
    copies.give_back(slot)
    assert copies.take(10**6) is not slot  # which is dropped for a larger one
    assert words.memory.tolist() == [1, 2, 3]


def test_calls_are_seen_by_the_watchdog_and_in_a_trace(
    cupy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    settle, here = staging.Slot.settle, threading.local()
    monkeypatch.setattr(
        staging.Slot, "settle", lambda slot: (seen.append(str(here.comm._watch.current)), settle(slot))
    )  # fmt: skip

    def run(comm: Communicator) -> None:
        here.comm = comm
        with trace(tmp_path / "trace.json", comm):
            comm.allreduce(late(cupy, own(comm, 33, "float32")))

    LocalWorld(2).run(run)
    assert seen == ["allreduce(float32[33], op=sum, parts=3)"] * 6
    events = traces.read(tmp_path / "trace.json")
    calls = [event["args"] for event in events if event["name"] == "allreduce"]
    assert len(calls) == 2
    for call in calls:
        assert call.items() >= {"bytes": 132, "op": "sum", "device_transport": "staged"}.items()


def test_only_the_buffers_wait_for_streams() -> None:
    """One choke point: nothing else in the room may order streams, or wait for them."""
    room = Path(mpitrain.__file__).parent / "comm"
    files = {path: path.read_text().replace("ledger.record(", "") for path in room.rglob("*.py")}
    found = {
        path.relative_to(room).parts[0]
        for path, text in files.items()
        if any(word in text for word in (".synchronize(", ".record()", ".fork()"))
    }
    assert found == {"buffers"}
