"""The array libraries that a check runs on: NumPy, CuPy, and what stands for CuPy where there is no GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import strict_cupy

from mpitrain.arrays import device, plain
from mpitrain.arrays.devices import cuda


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What stands for CuPy's mathematics, in its place."""
    monkeypatch.setitem(sys.modules, "cupy", strict_cupy.module())
    cuda._bfloat16.cache_clear()
    yield strict_cupy.module()
    cuda._bfloat16.cache_clear()


@pytest.fixture(params=["numpy", "strict", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request: pytest.FixtureRequest) -> Any:
    """The array library."""
    if request.param == "numpy":
        return np
    if request.param == "strict":
        return request.getfixturevalue("strict")
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    return cupy


@pytest.fixture
def allocator(xp: Any) -> Any:
    """Where the library's memory comes from."""
    return plain if xp is np else device
