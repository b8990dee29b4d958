"""Collectives on CuPy arrays and PyTorch tensors on a GPU, on the default stream and on others: `make test-gpu`.

The suites are those that run over a stand-in everywhere else; here the streams are kept busy, so that what does not
wait comes too early.  Ranks are threads, which share the GPU; or processes, with each transport that can be used there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ml_dtypes", reason="the suites need ml_dtypes")

import device_suite
from array_kinds import DTYPES, KINDS, Kind, _make_torch, _read_torch
from test_comm_any_array import CHECKS

from mpitrain.arrays.gpus import use_gpu
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.comm.buffers import staging
from mpitrain.comm.support import support

pytestmark = pytest.mark.gpu

SPIN = """
extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""
CYCLES = 1_000_000


@pytest.fixture
def torch(cupy: Any) -> Any:
    module = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not module.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    return module


@pytest.fixture(params=[device_suite.CHUNK_BYTES, staging.CHUNK_BYTES], ids=["short chunks", "long chunks"])
def busy(request: pytest.FixtureRequest, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Long kernels before every input."""
    spin = cupy.RawKernel(SPIN, "spin")
    monkeypatch.setattr(device_suite, "delay", lambda: spin((1,), (1,), (np.int64(CYCLES),)))
    monkeypatch.setattr(staging, "CHUNK_BYTES", request.param)
    return


@pytest.mark.parametrize("own_stream", [False, True], ids=["default stream", "own stream"])
@pytest.mark.parametrize("check", device_suite.CHECKS, ids=lambda check: check.__name__)
def test_cupy(check: Callable[..., None], own_stream: bool, cupy: Any, busy: None) -> None:
    def run(comm: Any) -> None:
        stream: AbstractContextManager[Any] = cupy.cuda.Stream(non_blocking=True) if own_stream else nullcontext()
        with stream:
            check(comm, cupy)

    for size in (1, 2) if "debug" not in check.__name__ else (1,):
        LocalWorld(size).run(run)


@pytest.fixture(params=["staged", "ipc", "nccl", "cuda_aware"])
def between_processes(request: pytest.FixtureRequest, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> Communicator:
    """The world, with each transport; its windows are not closed, for tests may fail on one rank."""
    from mpi4py import MPI

    if request.param == "nccl" and MPI.COMM_WORLD.size > cupy.cuda.runtime.getDeviceCount():
        pytest.skip("NCCL wants one GPU for each rank")
    if request.param == "cuda_aware" and not support().cuda_aware:
        pytest.skip("the MPI library does not take memory of GPUs")
    use_gpu(MPI.COMM_WORLD.rank)
    monkeypatch.setenv("MPITRAIN_DEVICE_TRANSPORT", request.param)
    made = Communicator.from_mpi(MPI.COMM_WORLD)
    assert made.device_transport == request.param
    return made


@pytest.mark.mpi
@pytest.mark.parametrize("own_stream", [False, True], ids=["default stream", "own stream"])
@pytest.mark.parametrize("check", device_suite.CHECKS, ids=lambda check: check.__name__)
def test_cupy_over_mpi(
    check: Callable[..., None], own_stream: bool, cupy: Any, busy: None, between_processes: Communicator
) -> None:  # fmt: skip
    stream: AbstractContextManager[Any] = cupy.cuda.Stream(non_blocking=True) if own_stream else nullcontext()
    with stream:
        check(between_processes, cupy)


@pytest.mark.mpi
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_any_array_of_torch_over_mpi(
    check: Callable[..., None], torch: Any, between_processes: Communicator
) -> None:  # fmt: skip
    if "different" not in check.__name__ or between_processes.device_transport == "staged":
        check(between_processes, Kind("torch cuda", lambda v: _make_torch(v).cuda(), _read_torch, lambda: torch.Tensor))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_any_array_of_cupy(check: Callable[..., None], cupy: Any) -> None:
    names = tuple(name for name in DTYPES if name != "bfloat16")
    LocalWorld(2).run(check, Kind("cupy", cupy.asarray, cupy.asnumpy, lambda: cupy.ndarray, names))


@pytest.mark.parametrize("own_stream", [False, True], ids=["default stream", "own stream"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_any_array_of_torch(check: Callable[..., None], own_stream: bool, torch: Any) -> None:
    kind = Kind("torch cuda", lambda v: _make_torch(v).cuda(), _read_torch, lambda: torch.Tensor)

    def run(comm: Any) -> None:
        stream: AbstractContextManager[Any] = torch.cuda.stream(torch.cuda.Stream()) if own_stream else nullcontext()
        with stream:
            check(comm, kind)

    LocalWorld(2).run(run)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_any_array_of_jax(check: Callable[..., None], cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied to the host and back, and so where they were before."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes most of the memory
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX finds no GPU")
    kind = KINDS["jax"]

    def read(array: Any) -> np.ndarray:
        assert {each.platform for each in array.devices()} == {"gpu"}
        return kind.read(array)

    LocalWorld(2).run(check, replace(kind, read=read))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_that_are_still_being_computed(torch: Any, dtype: str) -> None:
    def run(comm: Any) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for n in (5, 3_000_001):
                x = torch.zeros(n, dtype=getattr(torch, dtype), device="cuda")
                torch.cuda._sleep(10_000_000)
                x += comm.rank + 1
                total, kept = comm.allreduce(x), x.clone()
                comm.allreduce(x, out=x)
                assert total.device == x.device
                assert bool((total == 3).all())
                assert bool((x == 3).all())
                assert bool((kept == comm.rank + 1).all())

    LocalWorld(2).run(run)
