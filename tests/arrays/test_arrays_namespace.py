"""Which library an array belongs to, and which element types models compute in."""

from __future__ import annotations

import sys
import types

import ml_dtypes
import numpy as np
import pytest

import mpitrain.arrays as arrays
from mpitrain._errors import DtypeError, InputError, MissingExtraError
from mpitrain.arrays import Batch, by_device, is_cupy, namespace, to_host
from mpitrain.arrays.dtypes import accumulator, floating, is_bfloat16, is_float, is_half


class DeviceArray:
    """Stands for a CuPy array: has a shape, and is of the class that the stand-in module names."""

    shape = (3,)


@pytest.fixture
def cupy(monkeypatch):
    """Put a module in CuPy's place."""
    module = types.ModuleType("cupy")
    module.ndarray = DeviceArray
    module.asnumpy = lambda array: np.full(array.shape, 7.0)
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_host_arrays_and_scalars_are_numpy():
    assert namespace(np.zeros(3)) is np
    assert namespace(np.zeros(3), 2.0, None) is np
    assert namespace() is np
    assert not is_cupy(np.zeros(3))


def test_device_arrays_are_of_the_loaded_cupy(cupy):
    assert is_cupy(DeviceArray())
    assert namespace(DeviceArray(), 2.0) is cupy
    assert by_device("gpu") is cupy
    np.testing.assert_array_equal(to_host(DeviceArray()), [7, 7, 7])


def test_mixed_arrays_are_refused(cupy):
    with pytest.raises(InputError, match="host and device arrays are mixed; got ndarray, DeviceArray; move them"):
        namespace(np.zeros(3), DeviceArray())


def test_to_host_leaves_host_arrays_alone():
    array = np.arange(4)
    assert to_host(array) is array


def test_devices(monkeypatch):
    assert by_device("cpu") is np
    with pytest.raises(InputError, match="unknown device; got 'tpu'; expected 'cpu' or 'gpu'"):
        by_device("tpu")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(MissingExtraError, match="a GPU was asked for, but CuPy cannot be imported"):
        by_device("gpu")


def test_a_batch_is_as_long_as_its_inputs():
    inputs = np.zeros((4, 8, 8, 1))
    assert len(Batch(inputs, np.zeros(4, np.int64), np.arange(4))) == 4
    assert len(Batch(inputs[:0], np.zeros(0, np.int64), np.arange(0))) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"index": None}, r"^Batch: index has no rows; got None; expected an array of .*; .*index=numpy.arange\(n\)$"),
        ({"index": np.arange(2)}, "^Batch: index has another number of rows than inputs; got 2; expected 3$"),
        ({"index": np.arange(3.0)}, r"^Batch: index is not an integer .*; got float64 of shape \(3,\); of a batch"),
        ({"index": np.zeros((3, 1), int)}, r"^Batch: index is not an integer .*; got int64 of shape \(3, 1\)"),
        ({"inputs": [[1.0], [2.0], [3.0]]}, "^Batch: inputs has no rows; got .*; convert inputs with numpy.asarray$"),
        ({"inputs": np.array(1.0)}, r"^Batch: inputs has no rows; got array\(1.0?\); expected an array of shape"),
        ({"targets": np.zeros(4)}, "^Batch: targets has another number of rows than inputs; got 4; expected 3$"),
        ({"weights": np.ones(2)}, "^Batch: weights has another number of rows than inputs; got 2; expected 3$"),
        ({"weights": 1.0}, "^Batch: weights has no rows; got 1.0; "),
    ],
    ids=str,
)
def test_a_batch_of_other_kinds_is_refused_in_one_line(wrong, message):
    right = {"inputs": np.zeros((3, 1)), "targets": np.zeros(3), "index": np.arange(3)}
    with pytest.raises(InputError, match=message):
        Batch(**right | wrong)


def test_kinds_of_float():
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    assert is_bfloat16(bfloat16)
    assert not is_bfloat16(np.dtype(np.float16))
    assert [is_float(np.dtype(t)) for t in (bfloat16, "f2", "f4", "f8", "i4", "c8", "?")] == [True] * 4 + [False] * 3
    assert [is_half(np.dtype(t)) for t in (bfloat16, "f2", "f4", "i2")] == [True, True, False, False]


def test_halves_are_summed_in_single_precision():
    found = [accumulator(np.dtype(t)) for t in (ml_dtypes.bfloat16, "f2", "f4", "f8", "i8")]
    assert found == [np.dtype(t) for t in ("f4", "f4", "f4", "f8", "i8")]


def test_models_compute_in_single_or_double_precision():
    assert floating("float32", "model") == np.float32
    assert floating(np.float64, "model") == np.float64
    for bad in ("float16", "int32", "no such type", object()):
        with pytest.raises(DtypeError, match="expected float32 or float64"):
            floating(bad, "model")


def test_public_names_are_sorted_and_there():
    assert sorted(arrays.__all__) == arrays.__all__
    assert all(hasattr(arrays, name) for name in arrays.__all__)
