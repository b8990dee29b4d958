"""The codecs: one suite for all, on threads and over MPI; what each sends; and each against a serial oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import codec_conformance as suite
import ml_dtypes
import numpy as np
import pytest

from mpitrain._errors import DtypeError, InputError
from mpitrain.arrays import FlatBuffer, Key, Layout, Segment
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.comm.codecs import (
    CODECS,
    FORMATS,
    Bf16,
    Codec,
    CompressedSum,
    Format,
    Fp16,
    Full,
    Int8,
    PowerSGD,
    TopK,
    make_codec,
)
from mpitrain.comm.local import alone

RANKS = [
    *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2, 4)),  # processes run every size
    3,
    pytest.param("mpi", marks=pytest.mark.mpi),
]


@pytest.fixture(params=RANKS, ids=lambda ranks: f"ranks-{ranks}")
def on_ranks(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    if request.param == "mpi":
        world: Communicator = request.getfixturevalue("world")
        yield lambda check, *args: check(world, *args)
    else:
        yield LocalWorld(request.param, timeout_s=20).run


def test_every_codec_is_in_the_suite():
    assert {type(codec) for codec in suite.CODECS.values()} == set(CODECS.values())


@pytest.mark.parametrize("name", suite.CODECS)
def test_what_a_codec_remembers_is_as_much_as_it_says(name: str):
    codec = suite.CODECS[name]
    taken = suite.layout().select(each.name for each in suite.layout() if codec.takes(each))
    held = sum(each.size for buffer in codec.init(taken, suite.KEY).values() for each in buffer.layout)
    assert held == sum(map(codec.remembered, taken))


@pytest.mark.parametrize("name", suite.CODECS)
@pytest.mark.parametrize("check", suite.CHECKS, ids=lambda check: check.__name__)
def test_conforms(on_ranks: Callable[..., None], check: Callable[..., None], name: str):
    on_ranks(check, suite.CODECS[name])


# What is sent: the formulas of the docstrings, over again.


def padded(elements: int, itemsize: int = 4) -> int:
    line = 64 // itemsize
    return -(-elements // line) * line


N = sum(padded(int(np.prod(shape))) for shape in suite.TAKEN.values())
OTHERS = 4 * sum(int(np.prod(shape)) for shape in (suite.OTHERS | suite.STATISTICS).values())
A, B = 3 * 3 * 8 + 40, padded(16 * 4) + padded(30 * 4)


def width(ranks: int) -> int:
    return -(-N // ranks)


def kept(ratio: float) -> int:
    return sum(max(1, round(ratio * int(np.prod(shape)))) for shape in suite.TAKEN.values())


def blocks(n: int, block: int) -> int:
    return n + 4 * -(-n // block)


BYTES: dict[str, Callable[[int], dict[str, int]]] = {
    "fp16": lambda p: {"alltoall": p * 2 * width(p), "allgather": p * 2 * width(p)},
    "bf16": lambda p: {"alltoall": p * 2 * width(p), "allgather": p * 2 * width(p)},
    "int8": lambda p: dict.fromkeys(("alltoall", "allgather"), p * blocks(width(p), 256)),
    "int8 in small blocks": lambda p: dict.fromkeys(("alltoall", "allgather"), p * blocks(width(p), 10)),
    "topk": lambda p: {"allgather": p * (8 * kept(0.1) + OTHERS)},
    "topk as fp16": lambda p: {"allgather": p * (6 * kept(0.1) + OTHERS)},
    "topk as int8": lambda p: {"allgather": p * (4 * kept(0.1) + blocks(kept(0.1), 256) + OTHERS)},
    "topk of everything": lambda p: {"allgather": p * (8 * kept(1.0) + OTHERS)},
    "powersgd": lambda p: {"reduce": 4 * A * 4, "broadcast": 4 * A * 4, "allreduce": 4 * B},
    "powersgd of rank 1": lambda p: {
        "reduce": 4 * A,
        "broadcast": 4 * A,
        "allreduce": 4 * (padded(16) + padded(30)),
    },
}


@pytest.mark.parametrize("name", suite.CODECS)
def test_the_ledger_counts_what_the_formula_says(on_ranks: Callable[..., None], name: str):
    def check(comm: Communicator) -> None:
        compressed = suite.start(comm, suite.CODECS[name])
        before = comm.ledger.snapshot()
        suite.reduced(comm, compressed, 0)
        sent: dict[str, int] = {}
        for (axis, operation), count in comm.ledger.snapshot().items():
            earlier = before.get((axis, operation))
            if axis == comm.ledger.axis:
                sent[operation] = count.logical_bytes - (earlier.logical_bytes if earlier else 0)
        expected = BYTES[name](comm.size)
        expected["allreduce"] = expected.get("allreduce", 0) + (0 if name.startswith("topk") else OTHERS)
        assert {operation: found for operation, found in sent.items() if found} == {
            operation: count for operation, count in expected.items() if count
        }

    on_ranks(check)


# Each against a serial computation.


def serial_terms(size: int) -> list[np.ndarray]:
    """Every rank's compressed gradients, as they lie in the flat range."""
    found = []
    for rank in range(size):
        terms = FlatBuffer(suite.layout().select(suite.TAKEN))
        for name in suite.TAKEN:
            terms.views[name][...] = suite.gradients(rank, 0)[name]
        found.append(terms.flat)
    return found


def summed(comm: Communicator, codec: Codec) -> tuple[np.ndarray, CompressedSum]:
    compressed = suite.start(comm, codec)
    grads = suite.reduced(comm, compressed, 0)
    flat = FlatBuffer(compressed.residual.layout)
    for name in suite.TAKEN:
        flat.views[name][...] = grads.views[name]
    return flat.flat, compressed


@pytest.mark.parametrize(("codec", "half"), [(Fp16(), np.float16), (Bf16(), ml_dtypes.bfloat16)], ids=["fp16", "bf16"])
def test_halves_are_added_in_float32_and_rounded_once(on_ranks: Callable[..., None], codec: Codec, half: Any):
    def check(comm: Communicator) -> None:
        total = np.zeros(N, np.float32)
        for terms in serial_terms(comm.size):
            total += terms.astype(half).astype(np.float32)
        got, _ = summed(comm, codec)
        assert np.array_equal(got, total.astype(half).astype(np.float32))

    on_ranks(check)


@pytest.mark.parametrize("ratio", [0.001, 0.05, 1.0])
def test_topk_sends_the_largest_of_each_rank(on_ranks: Callable[..., None], ratio: float):
    def check(comm: Communicator) -> None:
        total, left = np.zeros(N, np.float32), []
        for terms in serial_terms(comm.size):
            for segment in suite.layout().select(suite.TAKEN):
                tensor = slice(segment.offset, segment.stop)
                size = np.abs(terms[tensor])
                sent = np.where(size >= np.sort(size)[-max(1, round(ratio * segment.size))], terms[tensor], 0)
                total[tensor] += sent
                terms[tensor] -= sent
            left.append(terms)
        got, compressed = summed(comm, TopK(ratio=ratio))
        assert np.array_equal(got, total)
        assert np.array_equal(compressed.residual.flat, left[comm.rank])

    on_ranks(check)


def test_powersgd_takes_one_step_of_power_iteration(on_ranks: Callable[..., None]):
    def check(comm: Communicator) -> None:
        start = suite.start(comm, PowerSGD(rank=3)).codec_state["q"]
        got, compressed = summed(comm, PowerSGD(rank=3))
        for name, shape in suite.TAKEN.items():
            whole = suite.total(comm.size, 0)[name].reshape(-1, shape[-1])
            basis, _ = np.linalg.qr(whole @ start.views[name].astype(np.float64))
            approximation = basis @ (basis.T @ whole)
            segment = compressed.residual.layout[name]
            mine = got[segment.offset : segment.stop].reshape(whole.shape)
            assert np.allclose(mine, approximation, atol=1e-5 * np.abs(whole).max())

    on_ranks(check)


def test_powersgd_is_exact_where_the_rank_suffices(on_ranks: Callable[..., None]):
    def check(comm: Communicator) -> None:
        layout = Layout.build([Segment("weight", (60, 50))], np.float64)
        rng = np.random.default_rng(0)
        matrix = rng.standard_normal((60, 2)) @ rng.standard_normal((2, 50))
        grads = FlatBuffer(layout)
        grads.views["weight"][...] = matrix * (comm.rank + 1)
        CompressedSum(comm, PowerSGD(rank=2), layout, suite.KEY).reduce(grads, 0)
        assert np.allclose(grads.views["weight"], matrix * sum(range(1, comm.size + 1)), atol=1e-10)

    on_ranks(check)


@pytest.mark.parametrize("codec", [PowerSGD(rank=2), TopK(ratio=0.05), TopK(ratio=0.05, values="int8")])
def test_sums_are_known_to_be_finite_unless_squares_overflow(on_ranks: Callable[..., None], codec: Codec):
    def check(comm: Communicator) -> None:
        for scale, known in ((1.0, True), (1e30, False)):
            compressed, grads = suite.start(comm, codec), FlatBuffer(suite.layout())
            for name, value in suite.gradients(comm.rank, 0).items():
                grads.views[name][...] = value * np.float32(scale)
            assert compressed.reduce(grads, 0) is known
            assert np.isfinite(grads.flat).all()

    on_ranks(check)


@pytest.mark.parametrize("codec", [PowerSGD(rank=2), TopK(ratio=0.001), TopK(ratio=0.001, values="int8")])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_sums_are_never_known_to_be_finite_that_are_not(on_ranks: Callable[..., None], codec: Codec, bad: float):
    def check(comm: Communicator) -> None:
        for name in (segment.name for segment in suite.layout() if segment.size):
            compressed, grads = suite.start(comm, codec), FlatBuffer(suite.layout())
            if comm.rank == comm.size - 1:
                grads.views[name].reshape(-1)[-1] = bad
            assert compressed.reduce(grads, 0) is False
            assert not np.isfinite(grads.flat).all()

    on_ranks(check)


def test_powersgd_leaves_tensors_alone_that_factors_would_not_shrink():
    shapes = {(64, 64): True, (4096,): False, (2048, 8): True, (2048, 4): False, (2048, 3): False, (): False}
    codec = PowerSGD(rank=4, min_size=1)
    assert {shape: codec.takes(Segment("x", shape)) for shape in shapes} == shapes
    assert all((a + b) * 4 < a * b for a, b in [shape for shape, taken in shapes.items() if taken])


# Formats.

AWKWARD = np.array(
    [0.0, -0.0, 1e-45, -1e-45, 1e-30, 65504.0, 65519.0, 65520.0, -7e4, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan],
    np.float32,
)


def every_half_way_point() -> np.ndarray:
    """Each bfloat16, and what lies between it and the next: a quarter, half, and three quarters of the way."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    return np.concatenate([upper | low for low in (0, 0x4000, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(np.float32)


def through(form: Format, values: np.ndarray, key: Key = suite.KEY, start: int = 0) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return form.decode(form.encode(values[None], key, start), values.dtype)[0]


def test_bf16_rounds_as_ml_dtypes_does_but_saturates():
    values = np.concatenate([every_half_way_point(), AWKWARD])
    with np.errstate(invalid="ignore", over="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    overflown = np.isinf(expected) & np.isfinite(values)
    expected[overflown] = np.copysign(np.float32(largest), values[overflown])
    got = through(Bf16(), values)
    assert overflown.any()
    assert np.array_equal(got, expected, equal_nan=True)
    assert np.array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(expected[~np.isnan(got)]))


def test_fp16_saturates_where_it_would_overflow():
    got = through(Fp16(), AWKWARD)
    limited = np.where(np.isfinite(AWKWARD), np.clip(AWKWARD, -65504, 65504), AWKWARD)
    assert np.array_equal(got, limited.astype(np.float16).astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_format_keeps_rows_and_what_is_not_finite(name: str, dtype: Any):
    form, rows = FORMATS[name](), np.random.default_rng(0).standard_normal((3, 300)).astype(dtype)
    wire = form.encode(rows, suite.KEY, 0)
    assert all(len(part) == 3 for part in wire)
    got = form.decode(wire, np.dtype(dtype))
    assert (got.dtype, got.shape) == (rows.dtype, rows.shape)
    assert np.allclose(got, rows, atol=0.05)
    for value in (np.nan, np.inf):
        rows[1, 7] = value
        with np.errstate(invalid="ignore", over="ignore"):
            got = form.decode(form.encode(rows, suite.KEY, 0), np.dtype(dtype))
        assert not np.isfinite(got[1, 7])
        assert np.isfinite(got[[0, 2]]).all()
    assert form.decode(form.encode(rows[:, :0], suite.KEY, 0), np.dtype(dtype)).shape == (3, 0)


def test_int8_is_right_on_average_and_within_a_step():
    values = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    form, tries = Int8(block=16), 4000
    found = np.stack([through(form, values, suite.KEY.at(number)) for number in range(tries)])
    step = np.repeat(np.abs(values.reshape(4, 16)).max(axis=1) / 127, 16)
    assert (np.abs(found - values) <= step * 1.001).all()
    below = (values / step) % 1
    deviation = step * np.sqrt(below * (1 - below) / tries)  # of the mean of a value rounded up in that share of tries
    assert (np.abs(found.mean(axis=0, dtype=np.float64) - values) <= 5 * deviation + 1e-6).all()


@pytest.mark.parametrize("loops", ["on", "off"])
def test_int8_saturates_beyond_127_times_what_float32_holds(monkeypatch: pytest.MonkeyPatch, loops: str):
    monkeypatch.setenv("MPITRAIN_KERNEL", loops)
    most = 127 * float(np.finfo(np.float32).max)
    values = np.array([1e200, -1e308, most, 1e30, *[0.0] * 4, 2.0, *[0.0] * 7])
    got = through(Int8(block=8), values)
    assert got[:3].tolist() == [most, -most, most]
    assert got[3] in (0.0, most / 127)
    assert abs(got[8] - 2.0) < 0.02
    assert not np.isfinite(through(Int8(block=8), np.array([1e200, np.inf])))[1]


def test_int8_rounds_an_element_alike_however_the_vector_is_cut():
    values = np.random.default_rng(1).standard_normal(200_000).astype(np.float32)
    whole = through(Int8(block=50), values)
    cuts = [through(Int8(block=50), values[low : low + 70_000], start=low) for low in range(0, 200_000, 70_000)]
    assert np.array_equal(whole, np.concatenate(cuts))
    assert not np.array_equal(whole, through(Int8(block=50), values, suite.KEY.child("other")))


def test_full_is_what_it_was():
    values = np.random.default_rng(2).standard_normal(9)
    assert np.array_equal(through(Full(), values), values)


# What is refused.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_codec("powersdg"), ["unknown codec", "'powersdg'", "bf16 or fp16", 'did you mean "powersgd"?']),
        (lambda: make_codec("topk", ration=1), ["codec topk: unknown option", "ration", 'did you mean "ratio"?']),
        (lambda: TopK(ratio=0.0), ["topk: ratio is not allowed", "got 0.0", "a number in (0, 1]"]),
        (lambda: TopK(values="fp8"), ["topk: values is not allowed", "'fp8'", "'bf16'"]),
        (lambda: PowerSGD(rank=0), ["powersgd: rank is not allowed", "got 0"]),
        (lambda: Int8(block=7), ["int8: block is not allowed", "a whole number in [8, inf)"]),
        (lambda: Fp16(min_size=0), ["fp16: min_size is not allowed", "got 0"]),
    ],
)
def test_options_are_checked(make: Callable[[], Codec], words: list[str]):
    with pytest.raises(InputError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_count_of_zero_is_refused_and_leaves_the_residual():
    summed = suite.start(alone(), Fp16())
    suite.reduced(alone(), summed, 0, 3.0)
    kept = summed.residual.flat.copy()
    with pytest.raises(InputError, match=r"CompressedSum.reduce: .*got count=0; expected a number above 0"):
        suite.reduced(alone(), summed, 1, 0)
    assert kept.any()
    assert np.array_equal(summed.residual.flat, kept)


def test_gradients_must_be_in_full_precision():
    layout = replace(suite.layout(), dtype=np.dtype(np.float16))
    with pytest.raises(DtypeError, match="gradients in a codec"):
        LocalWorld(1).run(lambda comm: CompressedSum(comm, Fp16(), layout, suite.KEY))
