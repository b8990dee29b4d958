"""The compiled loops of codecs give the bits of the NumPy path, and however work is cut, the result is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import codec_conformance as suite
import numpy as np
import pytest

from mpitrain.comm import Communicator, LocalWorld
from mpitrain.comm.codecs import Bf16, Format, Fp16, Int8, TopK, compressed, format, kernel, powersgd, topk

compiled = pytest.mark.skipif(kernel.LIBRARY.loaded is None, reason="the compiled loops are not built: no C compiler")
FORMATS = {"fp16": Fp16(), "bf16": Bf16(), "int8": Int8(), "int8 in small blocks": Int8(block=10)}


LARGEST = 127 * float(np.finfo(np.float32).max)
FAR = np.array([LARGEST, np.nextafter(LARGEST, 0), np.nextafter(LARGEST, np.inf), -1.5 * LARGEST, 1e308, np.inf])


def both(monkeypatch: pytest.MonkeyPatch, compute: Callable[[], Any]) -> list[Any]:
    """With the compiled loops, and without."""
    found = []
    for which in ("on", "off"):
        monkeypatch.setenv("MPITRAIN_KERNEL", which)
        with np.errstate(all="ignore"):
            found.append(compute())
    return found


def every_step() -> np.ndarray:
    """What float16 and bfloat16 hold, and what lies about half-way to the next: of each sign, at all exponents."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = (0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
    return np.concatenate([upper | low for low in lower]).view(np.float32)


def values(kind: str, dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "every step":
        return every_step().astype(dtype)[None]
    found = rng.standard_normal((3, 5003)) * 10.0 ** rng.integers(-45, 38, (3, 5003))
    if kind == "beyond float32":
        found = rng.standard_normal((3, 5003)) * 10.0 ** rng.integers(36, 300, (3, 5003))
        found[:, :40] = FAR[rng.integers(0, len(FAR), (3, 40))]
    if kind == "blocks of one size":
        found = rng.standard_normal((3, 5003)) * 1e-3
        found[1] = 0
        found[:, 700:1000] = 0
    return found.astype(dtype)


@compiled
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["every step", "of all sizes", "blocks of one size", "beyond float32"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_have_the_bits_of_numpy(monkeypatch: pytest.MonkeyPatch, name: str, kind: str, dtype: str):
    form: Format = FORMATS[name]
    with np.errstate(over="ignore", invalid="ignore"):
        rows = values(kind, dtype)
    wires = both(monkeypatch, lambda: form.encode(rows[:, :5001], suite.KEY, 13))
    finite = np.isfinite(rows[:, :5001])
    for one, other in zip(*wires, strict=True):
        same = (one == other) | ((one != one) & (other != other))
        assert same.all() if one.shape != finite.shape else same[finite].all()
    decoded = both(monkeypatch, lambda: form.decode(wires[1], np.dtype(dtype)))
    assert np.array_equal(*decoded, equal_nan=True)
    assert np.array_equal(*(np.signbit(each[~np.isnan(each)]) for each in decoded))
    with np.errstate(invalid="ignore"):
        got = form.decode(wires[0], np.dtype(dtype))
    assert not np.isfinite(got[~finite]).any()


@compiled
@pytest.mark.parametrize("codec", suite.CODECS)
def test_sums_have_the_bits_of_numpy(monkeypatch: pytest.MonkeyPatch, codec: str):
    def run(comm: Communicator) -> list[bytes]:
        started = suite.start(comm, suite.CODECS[codec])
        sums = [suite.reduced(comm, started, step, 3.0).flat.tobytes() for step in range(3)]
        return sums + [kept.buffer.flat.tobytes() for kept in started.kept]

    on, off = both(monkeypatch, lambda: LocalWorld(2, timeout_s=20).run(run))
    assert on == off


@compiled
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("takes_away", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (3, 8, 600), (40, 4, 512), (2, 9, 1030)])
def test_products_have_the_bits_of_numpy(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], takes_away: bool, dtype: str
):
    rows, rank, columns = shape
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((n, rank)).astype(dtype) for n in (rows, columns))
    left[0], right[0] = 0, -np.abs(right[0])  # sums of negative zeros

    def product() -> np.ndarray:
        out = np.full((rows, columns), -0.0, dtype) if takes_away else np.full((rows, columns), np.nan, dtype)
        powersgd._multiply(left, right, out, takes_away)
        return out

    on, off = both(monkeypatch, product)
    assert on.tobytes() == off.tobytes()
    assert np.allclose(off, (-1 if takes_away else 1) * (left @ right.T), atol=1e-4)


@compiled
def test_the_loops_are_used_and_can_be_forbidden(monkeypatch: pytest.MonkeyPatch):
    single, half, square = np.ones((1, 8), np.float32), np.empty((1, 8), np.uint16), np.ones((8, 8), np.float32)
    codes, steps, words = np.empty((1, 8), np.int8), np.empty((1, 1), np.float32), np.zeros(8, np.uint32)

    def used() -> list[bool]:
        return [
            kernel.quantise(single[0], words, 8, codes[0], steps[0]),
            kernel.dequantise(codes, steps, 8, single),
            kernel.convert("to_bf16", single, half),
            kernel.convert("from_bf16", half, single),
            kernel.multiply(single, square, single.copy(), False),
        ]

    assert both(monkeypatch, used) == [[True] * 5, [False] * 5]


@compiled
def test_what_does_not_fit_is_left_to_numpy():
    single, half = np.ones((4, 8), np.float32), np.empty((4, 4), np.float16)
    assert not kernel.convert("to_fp16", single[:, ::2], half)
    assert not kernel.convert("to_fp16", np.ones((4, 4)), half)
    assert not kernel.multiply(single.T, single, np.empty((8, 8), np.float32), False)


# However work is cut.


@pytest.mark.parametrize("name", suite.CODECS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_size_of_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch, name: str, ranks: int):
    def run(comm: Communicator) -> list[bytes]:
        started = suite.start(comm, suite.CODECS[name])
        sums = [suite.reduced(comm, started, step, 3.0).flat.tobytes() for step in range(2)]
        return [*sums, started.residual.flat.tobytes()]

    whole = LocalWorld(ranks, timeout_s=20).run(run)
    monkeypatch.setattr(format, "_CHUNK", 70)
    monkeypatch.setattr(compressed, "_BLOCK", 50)
    monkeypatch.setattr(powersgd, "_BLOCK_BYTES", 300)
    assert LocalWorld(ranks, timeout_s=20).run(run) == whole


@pytest.mark.parametrize("rides", [True, False])
def test_small_tensors_ride_along_with_topk(monkeypatch: pytest.MonkeyPatch, rides: bool):
    monkeypatch.setattr(topk, "_RIDES_BYTES", 1 << 16 if rides else 0)

    def run(comm: Communicator) -> None:
        grads = suite.reduced(comm, suite.start(comm, TopK()), 0)
        for name in suite.OTHERS | suite.STATISTICS:
            assert np.array_equal(grads.views[name], suite.total(2, 0)[name])
        assert {name for _, name in comm.ledger.snapshot()} == ({"allgather"} if rides else {"allgather", "allreduce"})

    LocalWorld(2, timeout_s=20).run(run)
