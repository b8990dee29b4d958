"""The array libraries that the collectives are tested with: how to make an array of each, and to read it back.

Values pass through Python numbers, so that no conversion of the package's own is trusted.  A library is imported when
a test asks for it, and the test is skipped where it is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

WIDE = ("int64", "uint64", "float64", "complex128")
DTYPES = (
    *("bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "bfloat16", "float32", "complex64"),
    *WIDE,
)


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


@dataclass(frozen=True)
class Kind:
    """One library.

    Parameters
    ----------
    name : str
    make : callable
        An array with the values of a NumPy array.
    read : callable
        A NumPy array with the values of a result.
    result : callable
        The type of the results.
    dtypes : tuple of str
        Names of what it can hold.
    mutable : bool
        Whether ``out=`` may be one of its arrays.
    """

    name: str
    make: Callable[[np.ndarray], Any]
    read: Callable[[Any], np.ndarray]
    result: Callable[[], type]
    dtypes: tuple[str, ...] = DTYPES
    mutable: bool = True

    def same(self, got: Any, expected: Any) -> None:
        """Check the library, dtype, shape and values of a result."""
        expected = np.asarray(expected)
        assert type(got) is self.result()
        found = self.read(got)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert np.array_equal(found, expected), f"got {found}, expected {expected}"

    def holds(self, given: Any, expected: np.ndarray) -> None:
        """Check the values of something that was handed in."""
        assert np.array_equal(self.read(given), expected)


def _make_torch(values: np.ndarray) -> Any:
    torch = pytest.importorskip("torch")
    return torch.tensor(values.tolist(), dtype=getattr(torch, values.dtype.name)).reshape(values.shape)


def _read_torch(tensor: Any) -> np.ndarray:
    name = str(tensor.dtype).removeprefix("torch.")
    return np.array(tensor.tolist(), numpy_dtype(name)).reshape(tuple(tensor.shape))


def _make_jax(values: np.ndarray) -> Any:
    jnp = pytest.importorskip("jax.numpy")
    return jnp.asarray(values.tolist(), values.dtype).reshape(values.shape)


def _read_jax(array: Any) -> np.ndarray:
    return np.array(array.tolist(), array.dtype).reshape(array.shape)


def _jax_type() -> type:
    return type(pytest.importorskip("jax.numpy").zeros(1))


class Speaker:
    """Speaks DLPack, and nothing else."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.values.__dlpack_device__()


class Member(Speaker):
    """An array of a library that follows the Python array API standard."""

    def __array_namespace__(self) -> type:
        return Namespace


class Namespace:
    @staticmethod
    def from_dlpack(x: Any) -> Member:
        return Member(np.from_dlpack(x))


class Interface:
    """Shows its memory by ``__array_interface__`` only."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.__array_interface__ = values.__array_interface__


def _read_any(found: Any) -> np.ndarray:
    return np.asarray(getattr(found, "values", found))


_NO_BFLOAT16 = tuple(name for name in DTYPES if name != "bfloat16")

KINDS = {
    kind.name: kind
    for kind in (
        Kind("numpy", np.array, np.asarray, lambda: np.ndarray),
        Kind("torch", _make_torch, _read_torch, lambda: pytest.importorskip("torch").Tensor),
        Kind("jax", _make_jax, _read_jax, _jax_type, tuple(n for n in DTYPES if n not in WIDE), mutable=False),
        Kind("dlpack", lambda v: Speaker(np.array(v)), _read_any, lambda: np.ndarray, _NO_BFLOAT16),
        Kind("array API", lambda v: Member(np.array(v)), _read_any, lambda: Member, _NO_BFLOAT16),
        Kind("memoryview", lambda v: memoryview(np.array(v)), _read_any, lambda: np.ndarray, _NO_BFLOAT16),
        Kind("interface", lambda v: Interface(np.array(v)), _read_any, lambda: np.ndarray, _NO_BFLOAT16),
    )
}


def address(array: Any) -> int:
    """Where an array lies."""
    for name in ("data_ptr", "unsafe_buffer_pointer"):
        if hasattr(array, name):
            return int(getattr(array, name)())
    if hasattr(array, "__cuda_array_interface__"):
        return int(array.__cuda_array_interface__["data"][0])
    found = getattr(array, "values", array)
    return int(np.asarray(found).__array_interface__["data"][0])
