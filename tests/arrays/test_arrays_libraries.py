"""Arrays that lie on a device, with stand-ins for the device; the rest is tested through the collectives."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import standin_cupy

from mpitrain._errors import InputError, MissingExtraError
from mpitrain.arrays.dtypes import storage
from mpitrain.arrays.libraries import LIBRARIES, owner, torch_tensors
from mpitrain.comm import LocalWorld

CupyArray = standin_cupy.asarray


class NumbaArray:
    """Shows memory of a GPU, and is of no library."""

    def __init__(self, values: np.ndarray, read_only: bool = False) -> None:
        self.memory = values
        interface = dict(values.__array_interface__, version=3, stream=None)
        self.__cuda_array_interface__ = interface | {"data": (interface["data"][0], read_only)}


class OnCuda:
    """Speaks DLPack on a CUDA device."""

    def __init__(self, values: np.ndarray) -> None:
        self.memory = values

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("only CuPy may read it")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    module = standin_cupy.module()
    monkeypatch.setitem(sys.modules, "cupy", module)
    yield module
    standin_cupy.forget()


@pytest.mark.parametrize("kind", [CupyArray, NumbaArray, OnCuda])
def test_memory_of_a_device(cupy: types.ModuleType, kind: Any) -> None:
    def run(comm: Any) -> None:
        x = kind(np.full((2, 3), comm.rank + 1.0))
        got = comm.allreduce(x)
        assert type(got) is standin_cupy.ndarray
        assert np.array_equal(standin_cupy.asnumpy(got), np.full((2, 3), 6.0))
        assert np.array_equal(standin_cupy.asnumpy(comm.allgather({"a": x})["a"])[:, 0, 0], [1, 2, 3])
        assert np.array_equal(x.memory, np.full((2, 3), comm.rank + 1.0))
        with pytest.raises(InputError, match=r"a PyTorch tensor on the CPU|read-only"):
            comm.allreduce_plan(x)

    LocalWorld(3).run(run)


@pytest.mark.parametrize("kind", [CupyArray, NumbaArray])
def test_results_are_put_into_device_memory(cupy: types.ModuleType, kind: Any) -> None:
    def run(comm: Any) -> None:
        x = kind(np.full(3, comm.rank + 1.0))
        memory = x.memory
        assert comm.allreduce(x, out=x) is x
        if kind is CupyArray:  # of other arrays nobody knows on which stream they are read: they are there
            cupy.cuda.get_current_stream().synchronize()
        assert np.array_equal(memory, [3.0] * 3)

    LocalWorld(2).run(run)


def test_read_only_device_memory_is_refused(cupy: types.ModuleType) -> None:
    def run(comm: Any) -> None:
        for out in (NumbaArray(np.zeros(3), read_only=True), OnCuda(np.zeros(3))):
            with pytest.raises(InputError, match="allreduce: out is read-only"):
                comm.allreduce(out, out=out)

    LocalWorld(1).run(run)


def test_device_memory_without_cupy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)

    def run(comm: Any) -> None:
        with pytest.raises(MissingExtraError, match=r"pip install 'mpitrain\[cuda13\]'"):
            comm.allreduce(NumbaArray(np.zeros(3)))

    LocalWorld(1).run(run)


def test_tensors_of_a_device_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU, treated as if they had no memory that NumPy can see."""
    torch = pytest.importorskip("torch")
    tensors = owner(torch.zeros(1))
    assert tensors is not None
    opened = type(tensors).open

    def hidden(self: Any, operation: str, x: Any) -> Any:
        operand = opened(self, operation, x)
        operand.view = None
        return operand

    monkeypatch.setattr(type(tensors), "open", hidden)

    def run(comm: Any) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.full((2, 3), comm.rank + 1.0, dtype=dtype, requires_grad=True)
            assert comm.allreduce(x).tolist() == [[6.0] * 3] * 2
            assert comm.broadcast([x], 2)[0].tolist() == [[3.0] * 3] * 2
            strided = torch.zeros(3, 2, dtype=dtype).T
            assert comm.allreduce(x, out=strided) is strided
            assert strided.tolist() == [[6.0] * 3] * 2

    LocalWorld(3).run(run)


@pytest.mark.parametrize("name", [*torch_tensors._SHARED, "bfloat16"])
def test_tensors_of_a_gpu_are_words_there(cupy: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Both ways between a tensor and words, on a tensor of the CPU that is passed off as one of a GPU."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(cupy, "asarray", lambda tensor: standin_cupy.ndarray(tensor.numpy()))
    tensor = torch.tensor([[0, 1, 3], [2, 0, 1]]).to(getattr(torch, name)).T
    dtype = torch_tensors._dtype("", tensor.dtype)
    words = torch_tensors._memory(tensor, dtype)
    assert (words.dtype, words.shape, words.data.ptr) == (storage(dtype), (3, 2), tensor.data_ptr())
    again = torch_tensors._adopt(np.ascontiguousarray(words.memory), dtype)
    assert again.dtype == tensor.dtype
    assert again.tolist() == tensor.tolist()


def test_no_library_is_imported() -> None:
    code = (
        "import sys, numpy as np, mpitrain.comm as c\n"
        "c.LocalWorld(1).run(lambda comm: comm.allreduce({'a': np.ones(3), 'b': memoryview(b'abc')}))\n"
        "print([name for name in ('torch', 'jax', 'cupy', 'ml_dtypes') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_everything_else_is_nobodys() -> None:
    for x in ("text", 3, None, object(), {1}, range(3)):
        assert owner(x) is None
    assert len({library.name for library in LIBRARIES}) == len(LIBRARIES)
