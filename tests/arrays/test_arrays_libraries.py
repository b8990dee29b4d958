"""Arrays that lie on a device, with stand-ins for the device; the rest is tested through the collectives."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest

from mpitrain._errors import InputError, MissingExtraError
from mpitrain.arrays.libraries import LIBRARIES, owner
from mpitrain.comm import LocalWorld


class CupyArray:
    """Stands for a CuPy array."""

    def __init__(self, values: np.ndarray) -> None:
        self.memory = values
        self.dtype, self.shape = values.dtype, values.shape

    def __setitem__(self, where: Any, other: CupyArray) -> None:
        self.memory[where] = other.memory


class NumbaArray:
    """Shows memory of a GPU, and is of no library."""

    def __init__(self, values: np.ndarray, read_only: bool = False) -> None:
        self.memory = values
        self.__cuda_array_interface__ = {"data": (1, read_only), "version": 3}


class OnCuda:
    """Speaks DLPack on a CUDA device."""

    def __init__(self, values: np.ndarray) -> None:
        self.memory = values

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("only CuPy may read it")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Put a module in CuPy's place that keeps device memory in NumPy arrays."""
    module: Any = types.ModuleType("cupy")
    module.ndarray = CupyArray
    module.asnumpy = lambda array: array.memory.copy()
    module.asarray = lambda x: CupyArray(x.memory if hasattr(x, "memory") else np.array(x))
    module.from_dlpack = lambda x: CupyArray(x.memory)
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.mark.parametrize("kind", [CupyArray, NumbaArray, OnCuda])
def test_memory_of_a_device_is_copied(cupy: types.ModuleType, kind: type) -> None:
    def run(comm: Any) -> None:
        x = kind(np.full((2, 3), comm.rank + 1.0))
        got = comm.allreduce(x)
        assert type(got) is CupyArray
        assert np.array_equal(got.memory, np.full((2, 3), 6.0))
        assert np.array_equal(comm.allgather({"a": x})["a"].memory[:, 0, 0], [1, 2, 3])
        assert np.array_equal(x.memory, np.full((2, 3), comm.rank + 1.0))
        with pytest.raises(InputError, match=r"a PyTorch tensor on the CPU|read-only"):
            comm.allreduce_plan(x)

    LocalWorld(3).run(run)


@pytest.mark.parametrize("kind", [CupyArray, NumbaArray])
def test_results_are_copied_into_device_memory(cupy: types.ModuleType, kind: type) -> None:
    def run(comm: Any) -> None:
        x = kind(np.full(3, comm.rank + 1.0))
        memory = x.memory
        assert comm.allreduce(x, out=x) is x
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
