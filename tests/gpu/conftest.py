"""The array libraries that a check runs on: NumPy, CuPy, and what stands for CuPy where there is no GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import c_kernels
import numpy as np
import pytest
import strict_cupy

from mpitrain.arrays import device, kernels_cuda, plain

_CUPY = pytest.param("cupy", marks=pytest.mark.gpu)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What stands for CuPy's mathematics, in its place."""
    if c_kernels.COMPILER is None:
        pytest.skip("no C compiler, for the kernels of a GPU")
    monkeypatch.setitem(sys.modules, "cupy", strict_cupy.module())
    made = kernels_cuda.elementwise, kernels_cuda.row_sums
    for each in made:
        each.cache_clear()
    yield strict_cupy.module()
    for each in made:
        each.cache_clear()


@pytest.fixture
def cupy() -> Any:
    """CuPy, where there is a GPU."""
    found = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        found.cuda.runtime.getDeviceCount()
    except found.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    return found


@pytest.fixture(params=["strict", _CUPY])
def gpu(request: pytest.FixtureRequest) -> Any:
    """A library for arrays on a GPU."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["numpy", "strict", _CUPY])
def xp(request: pytest.FixtureRequest) -> Any:
    """The array library."""
    return np if request.param == "numpy" else request.getfixturevalue(request.param)


@pytest.fixture
def allocator(xp: Any) -> Any:
    """Where the library's memory comes from."""
    return plain if xp is np else device
