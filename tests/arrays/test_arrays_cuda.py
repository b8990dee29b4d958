"""The kernels of devices, compiled for the host: they are C but for two functions of CUDA's."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mpitrain.arrays import philox_cuda
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
void philox(unsigned long long row, unsigned long long block, unsigned step, unsigned k0, unsigned k1, unsigned *out) {
    unsigned w0, w1, w2, w3;
    %s
    out[0] = w0; out[1] = w1; out[2] = w2; out[3] = w3;
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    folder: Path = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.c").write_text(SOURCE % (cuda._NARROW, cuda._WIDEN, philox_cuda._ENCRYPT))
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


def test_philox_gives_the_numbers_of_random123(kernels: ctypes.CDLL) -> None:
    """Its known answers for Philox4x32-10: ``tests/kat_vectors`` of Random123."""
    ones = 2**32 - 1
    cases = [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ones,) * 4, (ones,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]  # fmt: skip
    for (c0, c1, c2, c3), (k0, k1), expected in cases:
        found = np.zeros(4, np.uint32)
        words = (ctypes.c_ulonglong(c1 | c2 << 32), ctypes.c_ulonglong(c0), *map(ctypes.c_uint32, (c3, k0, k1)))
        kernels.philox(*words, ctypes.c_void_p(found.ctypes.data))
        assert " ".join(f"{word:08x}" for word in found) == expected
