"""The kernels of devices, compiled for the host: they are C but for two functions of CUDA's."""

from __future__ import annotations

import c_kernels
import ml_dtypes
import numpy as np
import pytest
from c_kernels import ElementwiseKernel

from mpitrain.arrays import philox_cuda
from mpitrain.arrays.devices import cuda

pytestmark = pytest.mark.skipif(c_kernels.COMPILER is None, reason="no C compiler")


def narrowed(floats: np.ndarray) -> np.ndarray:
    found = np.empty(floats.shape, np.uint16)
    ElementwiseKernel("float32 x", "uint16 y", cuda._NARROW, "narrow")(floats, found)
    return found


def test_narrowing_rounds_as_ml_dtypes_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 1_000_000, np.uint32)
    halfway = (np.arange(2**16, dtype=np.uint32) << 16) + np.uint32(0x8000)
    floats = np.concatenate([bits, halfway, halfway - np.uint32(1), halfway + np.uint32(1)]).view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = floats.astype(ml_dtypes.bfloat16)
    found = narrowed(floats)
    wrong = (found != expected.view(np.uint16)) & ~np.isnan(floats)
    assert not wrong.any()
    assert np.isnan(found[np.isnan(floats)].view(ml_dtypes.bfloat16)).all()


def test_widening_is_exact() -> None:
    words = np.arange(2**16, dtype=np.uint16)
    expected = words.view(ml_dtypes.bfloat16).astype(np.float32)
    found = np.empty(words.shape, np.float32)
    ElementwiseKernel("uint16 x", "float32 y", cuda._WIDEN, "widen")(words, found)
    assert np.array_equal(found, expected, equal_nan=True)


def test_philox_gives_the_numbers_of_random123() -> None:
    """Its known answers for Philox4x32-10: ``tests/kat_vectors`` of Random123."""
    ones = 2**32 - 1
    cases = [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ones,) * 4, (ones,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]  # fmt: skip
    encrypt = ElementwiseKernel(philox_cuda._GIVEN, philox_cuda._MADE, philox_cuda._ENCRYPT, "philox")
    for (c0, c1, c2, c3), (k0, k1), expected in cases:
        found = np.zeros(4, np.uint32)
        encrypt(c1 | c2 << 32, c0, c3, k0, k1, *(found[word : word + 1] for word in range(4)))
        assert " ".join(f"{word:08x}" for word in found) == expected
