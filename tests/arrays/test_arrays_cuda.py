"""The kernels for bfloat16, compiled for the host: they are C but for two functions of CUDA's."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mpitrain.arrays.devices import cuda

SOURCE = """
#include <math.h>
#include <string.h>
static unsigned int __float_as_uint(float x) { unsigned int bits; memcpy(&bits, &x, 4); return bits; }
static float __uint_as_float(unsigned int bits) { float x; memcpy(&x, &bits, 4); return x; }
void narrow(const float *in, unsigned short *out, long n) {
    for (long i = 0; i < n; i++) { float x = in[i]; unsigned short y; %s; out[i] = y; }
}
void widen(const unsigned short *in, float *out, long n) {
    for (long i = 0; i < n; i++) { unsigned short x = in[i]; float y; %s; out[i] = y; }
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    folder: Path = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.c").write_text(SOURCE % (cuda._NARROW, cuda._WIDEN))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "kernels.so", folder / "kernels.c"], check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


def call(kernel: Callable[..., object], values: np.ndarray, result: str) -> np.ndarray:
    found = np.empty(values.shape, result)
    kernel(ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(found.ctypes.data), ctypes.c_long(values.size))
    return found


def test_narrowing_rounds_as_ml_dtypes_does(kernels: ctypes.CDLL) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 1_000_000, np.uint32)
    halfway = (np.arange(2**16, dtype=np.uint32) << 16) + np.uint32(0x8000)
    floats = np.concatenate([bits, halfway, halfway - np.uint32(1), halfway + np.uint32(1)]).view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = floats.astype(ml_dtypes.bfloat16)
    found = call(kernels.narrow, floats, "uint16")
    wrong = (found != expected.view(np.uint16)) & ~np.isnan(floats)
    assert not wrong.any()
    assert np.isnan(found[np.isnan(floats)].view(ml_dtypes.bfloat16)).all()


def test_widening_is_exact(kernels: ctypes.CDLL) -> None:
    words = np.arange(2**16, dtype=np.uint16)
    expected = words.view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(call(kernels.widen, words, "float32"), expected, equal_nan=True)
