"""Reproducible sums: the same bits for every order, algorithm, number of ranks and way of sharing out lanes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain._errors import DtypeError, InputError, MismatchError, NonFiniteError
from mpitrain.arrays import FlatBuffer, Layout, Segment
from mpitrain.comm import Communicator, LaneSum, LocalWorld, lane_reduce_scatter, lane_sum, reproducible
from mpitrain.comm.algorithms import names as algorithms

LANES = 12
INEXACT = ["float16", ml_dtypes.bfloat16, "float32", "float64", "complex64", "complex128"]
LAYOUT = Layout.build([Segment("w", (37, 5)), Segment("b", (37,), group="no_decay"), Segment("zero", (3,))])


def rough(number: int, shape: tuple[int, ...], dtype: Any = "float32") -> np.ndarray:
    """Values over ten orders of magnitude, whose float sums depend on the order."""
    rng = np.random.default_rng(number)
    parts = [rng.standard_normal(shape) * 10.0 ** rng.uniform(-7, 3, shape) for _ in range(2)]
    if np.dtype(dtype).kind == "c":
        return (parts[0] + 1j * parts[1]).astype(dtype)
    return parts[0].astype(dtype)


def lane(number: int, scale: float = 1.0) -> np.ndarray:
    """A flat lane of LAYOUT: weights near 1e4, biases near 1e-6, and a tensor of zeros."""
    buffer = FlatBuffer(LAYOUT)
    buffer.views["w"][...] = scale * rough(number, (37, 5))
    buffer.views["b"][...] = scale * 1e-9 * rough(1000 + number, (37,))
    return np.array(buffer.flat)


def local(size: int, program: Callable[..., Any], *args: Any) -> list[Any]:
    return LocalWorld(size, timeout_s=20).run(program, *args)


def bits(x: Any) -> Any:
    return {k: bits(v) for k, v in x.items()} if isinstance(x, dict) else (str(x.dtype), x.shape, x.tobytes())


def shares(total: int, size: int, seed: int) -> list[list[int]]:
    """Lane numbers of each rank: shuffled, uneven, and for some seeds all on one rank."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, total + 1, size - 1)) if seed % 3 else np.full(size - 1, total)
    return [part.tolist() for part in np.split(rng.permutation(total), cuts)]


# One array per rank.


@pytest.mark.parametrize("dtype", INEXACT, ids=str)
@pytest.mark.parametrize("op", ["sum", "mean"])
def test_the_order_of_ranks_changes_no_bit(dtype: Any, op: str) -> None:
    terms = [rough(number, (3, 41), dtype) for number in range(8)]

    def program(comm: Communicator, order: Sequence[int]) -> Any:
        return comm.allreduce(terms[order[comm.rank]], op, reproducible=True)

    found = [local(8, program, np.random.default_rng(seed).permutation(8)) for seed in range(4)]
    assert len({str(bits(result)) for results in found for result in results}) == 1


def test_zeros_on_further_ranks_change_no_bit() -> None:
    def program(comm: Communicator) -> Any:
        return comm.allreduce(rough(comm.rank, (99,), "float64") * (comm.rank < 3), reproducible=True)

    assert len({str(bits(local(size, program)[0])) for size in range(3, 9)}) == 1


@pytest.mark.parametrize("algorithm", [None, "default", *algorithms("allreduce")])
def test_the_algorithm_changes_no_bit(algorithm: str | None) -> None:
    terms = [rough(number, (257,)) for number in range(5)]
    results = local(5, lambda comm: comm.allreduce(terms[comm.rank], algorithm=algorithm, reproducible=True))
    assert {str(bits(result)) for result in results} == {str(bits(lane_sum_of(terms)))}


def test_float_sums_do_depend_on_the_order() -> None:
    terms = [rough(number, (257,)) for number in range(8)]
    plain = [local(8, lambda comm, k=k: comm.allreduce(terms[comm.rank * k % 8]))[0] for k in (1, 3, 5, 7)]
    assert len({result.tobytes() for result in plain}) > 1


def lane_sum_of(terms: list[np.ndarray], **options: Any) -> np.ndarray:
    return local(1, lambda comm: lane_sum(comm, terms, len(terms), **options))[0]


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_within_the_bound_of_the_exact_sum(size: int) -> None:
    terms = [rough(number, (500,), "float64") for number in range(size)]
    got = local(size, lambda comm: comm.allreduce(terms[comm.rank], reproducible=True))[0]
    exact = np.array([math.fsum(column) for column in np.array(terms).T])
    largest = max(np.abs(term).max() for term in terms)
    assert np.all(np.abs(got - exact) <= size * 2.0**-53 * largest + np.spacing(np.abs(exact)))


def test_trees_integers_and_out() -> None:
    def tree(rank: int) -> dict[str, Any]:
        return {
            "w": rough(rank, (4, 5)),
            "tiny": 1e-30 * rough(rank, (7,)),
            "double": 1e-200 * rough(rank, (3,), "float64"),
            "count": np.array([rank, 2**62 // 8]),
            "empty": np.empty((0, 2), np.float32),
            "half": np.float16(rank),
            "complex": rough(rank, (2,), "complex64"),
        }

    def program(comm: Communicator) -> Any:
        x = tree(comm.rank)
        before = bits(x | {"half": np.asarray(x["half"])})
        fused = comm.allreduce(x, reproducible=True)
        assert bits(x | {"half": np.asarray(x["half"])}) == before
        for name, value in x.items():
            assert bits(fused[name]) == bits(comm.allreduce(value, reproducible=True))
            at_root = comm.reduce(value, root=comm.size - 1, reproducible=True)
            assert at_root is None if comm.rank < comm.size - 1 else bits(at_root) == bits(fused[name])
        assert comm.allreduce(x["w"].T, out=x["w"].T, reproducible=True).T.tobytes() == fused["w"].tobytes()
        assert x["w"].tobytes() == fused["w"].tobytes()
        strided = np.zeros((4, 10), np.float32)[:, ::2]
        assert comm.allreduce(tree(comm.rank)["w"], out=strided, reproducible=True) is strided
        assert np.array_equal(strided, fused["w"])
        return fused

    for results in (local(3, program),):
        assert np.array_equal(results[0]["count"], [3, 3 * (2**62 // 8)])
        assert results[0]["half"] == 3
        exact = np.sum([tree(rank)["tiny"].astype(np.float64) for rank in range(3)], axis=0)
        assert np.allclose(results[0]["tiny"], exact, rtol=1e-6, atol=0)  # though small beside "w"


@pytest.mark.parametrize("dtype", [*INEXACT, "int32"], ids=str)
def test_reduce_scatter_gives_the_rows_of_the_sum(dtype: Any) -> None:
    def program(comm: Communicator) -> None:
        x = rough(comm.rank, (7, 2, 3), dtype)
        counts = [0, *([2] * (comm.size - 2)), 7 - 2 * (comm.size - 2)] if comm.size > 1 else [7]
        start = sum(counts[: comm.rank])
        op = "sum" if dtype == "int32" else "mean"
        whole = comm.allreduce(x, op, reproducible=True)
        own = comm.reduce_scatter(x, op, counts, reproducible=True)
        assert bits(own) == bits(np.ascontiguousarray(whole[start : start + counts[comm.rank]]))
        rows = rough(comm.rank, (comm.size, 3), dtype)
        out = np.empty(3, dtype)
        assert comm.reduce_scatter({"a": rows}, out={"a": out}, reproducible=True)["a"] is out
        assert bits(out) == bits(np.ascontiguousarray(comm.allreduce(rows, reproducible=True)[comm.rank]))
        assert comm.reduce_scatter(np.empty((comm.size, 0), dtype), reproducible=True).shape == (0,)

    for size in (1, 2, 3, 4):
        local(size, program)


def test_buckets_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = [lane(number) for number in range(3)]
    expected = bits(lane_sum_of(lanes, layout=LAYOUT))
    monkeypatch.setattr(reproducible, "BUCKET_BYTES", 8 * 11)
    assert bits(lane_sum_of(lanes, layout=LAYOUT)) == expected


def test_cost_as_documented() -> None:
    def program(comm: Communicator) -> None:
        comm.allreduce({"a": np.ones((5, 5), np.float32), "b": np.ones(3, np.float32)}, reproducible=True)
        count = comm.ledger.snapshot()["world", "allreduce"]
        assert count.logical_bytes == 4 * 2 + 8 * 28
        assert count.messages == 2

    local(3, program)


# Lanes.


def lanes_of(comm: Communicator, seed: int, scale: float = 1.0) -> list[np.ndarray]:
    return [lane(number, scale) for number in shares(LANES, comm.size, seed)[comm.rank]]


def sum_any_way(comm: Communicator, seed: int) -> Any:
    lanes = lanes_of(comm, seed)
    out = np.full(LAYOUT.size, 0, np.float32)
    total = lane_sum(comm, lanes, LANES, layout=LAYOUT, out=out)
    assert total is out
    counts = [0] * comm.size
    counts[seed % comm.size] = LAYOUT.size // 3
    counts[-1] += LAYOUT.size - LAYOUT.size // 3
    own = np.zeros(counts[comm.rank], np.float32)
    lane_reduce_scatter(comm, lanes, LANES, counts, layout=LAYOUT, out=own)
    assert comm.allgather(own, counts).tobytes() == total.tobytes()
    mean = lane_sum(comm, lanes, LANES, op="mean", layout=LAYOUT, out=np.zeros_like(out))
    assert np.array_equal(mean, total / np.float32(LANES))
    return total


def test_lanes_give_the_same_bits_however_shared_out() -> None:
    found = {result.tobytes() for size in range(1, 9) for seed in range(4) for result in local(size, sum_any_way, seed)}
    assert len(found) == 1
    exact = np.array([math.fsum(column) for column in np.array([lane(n) for n in range(LANES)], np.float64).T])
    got = np.frombuffer(found.pop(), np.float32)
    for segment in LAYOUT:
        part = slice(segment.offset, segment.stop)
        largest = max(np.abs(lane(n)[part]).max() for n in range(LANES))
        rounding = np.spacing(np.abs(exact[part]).astype(np.float32))
        assert np.all(np.abs(got[part] - exact[part]) <= LANES * 2.0**-53 * largest + rounding)


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.floats(-1e300, 1e300), min_size=3, max_size=3), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_lanes_of_adversarial_magnitudes(rows: list[list[float]], random: Any) -> None:
    terms = [np.array(row) for row in rows]
    owners = [random.randrange(4) for _ in terms]
    numbers = random.sample(range(len(terms)), len(terms))

    def program(comm: Communicator) -> Any:
        own = [terms[number] for number in numbers if owners[number] == comm.rank]
        return lane_sum(comm, own, len(terms), out=np.empty(3))

    expected = lane_sum_of(terms)
    assert {result.tobytes() for result in local(4, program)} == {expected.tobytes()}
    largest = max(abs(value) for row in rows for value in row)
    for got, column in zip(expected, zip(*rows, strict=True), strict=True):
        exact = math.fsum(column)
        assert abs(got - exact) <= len(rows) * 2.0**-53 * largest + math.ulp(exact)


@pytest.mark.parametrize("dtype", INEXACT, ids=str)
def test_lanes_of_every_dtype_and_shape(dtype: Any) -> None:
    terms = [rough(number, (2, 3, 4), dtype)[:, ::2] for number in range(4)]
    expected = bits(local(4, lambda comm: comm.allreduce(terms[comm.rank], reproducible=True))[0])
    assert bits(lane_sum_of(terms)) == expected
    out = np.zeros((2, 2, 8), dtype)[:, :, ::2]
    assert lane_sum_of(terms, out=out) is out
    assert bits(np.ascontiguousarray(out)) == expected
    copies = [np.ascontiguousarray(term) for term in terms]
    assert lane_sum_of(copies, out=copies[2]) is copies[2]
    assert bits(copies[2]) == expected
    assert lane_sum_of([np.asarray(term[0, 0, 0]) for term in terms]).shape == ()
    assert lane_sum_of([term[:0] for term in terms]).shape == (0, 2, 4)


# Lanes that are not kept.


def run_predicted(comm: Communicator, scales: Sequence[float], seed: int, saved: Any = None) -> Any:
    """Sum lanes of the given scales, one after the other; returns the sums and how often each was repeated."""
    total = LaneSum(comm, LAYOUT, LANES, exponents=saved)
    sums, repeats = [], []
    for step, scale in enumerate(scales):
        out = np.full(LAYOUT.size, 0, np.float32)
        for attempt in range(3):
            for each in lanes_of(comm, seed + step + attempt, scale):
                total.add(each)
                each[:] = np.nan
            if total.finish(out):
                break
            assert not out.any()
        sums.append(out.tobytes())
        repeats.append(attempt)
    return sums, repeats, total.exponents.tolist()


SCALES = [1.0, 3.9, 1.0, 40.0, 0.5, 2.0**-30, 0.0, 1.0, 1e-30, 1e-36]
REPEATS = [1, 0, 0, 1, 0, 1, 0, 1, 1, 1]


def test_predicted_exponents_give_the_same_bits_and_repeats_however_shared_out() -> None:
    found = [
        result for size in (1, 2, 3, 4, 8) for seed in (0, 1) for result in local(size, run_predicted, SCALES, seed)
    ]
    assert found[0][1] == REPEATS
    assert all(result == found[0] for result in found)


def test_predicted_exponents_are_within_their_bound() -> None:
    sums, _, _ = local(2, run_predicted, SCALES, 0)[0]
    for got, scale in zip(sums, SCALES, strict=True):
        lanes = np.array([lane(number, scale) for number in range(LANES)], np.float64)
        exact = np.array([math.fsum(column) for column in lanes.T])
        for segment in LAYOUT:
            part = slice(segment.offset, segment.stop)
            rounding = np.spacing(np.abs(exact[part]).astype(np.float32))
            bound = LANES * 2.0 ** (12 - 53) * np.abs(lanes[:, part]).max()
            assert np.all(np.abs(np.frombuffer(got, np.float32)[part] - exact[part]) <= bound + rounding)


def test_predictions_are_saved_with_the_run() -> None:
    whole = local(1, run_predicted, SCALES[:5], 0)[0]
    first = local(1, run_predicted, SCALES[:2], 0)[0]
    saved = np.array(first[2], np.int32)
    rest = local(3, run_predicted, SCALES[2:5], 5, saved)[0]
    assert first[0] + rest[0] == whole[0]
    assert first[1] + rest[1] == whole[1]


def test_a_failed_sum_leaves_nothing_behind() -> None:
    def program(comm: Communicator) -> None:
        total = LaneSum(comm, LAYOUT, comm.size)
        out = np.zeros(LAYOUT.size, np.float32)
        for value in (lane(comm.rank), lane(comm.rank) + np.float32(np.nan), lane(comm.rank)):
            total.add(value)
            if np.isnan(value).any():
                with pytest.raises(NonFiniteError, match=r"on ranks \[0, 1\], in w, zero, b"):
                    total.finish(out)
            else:
                total.finish(out)
        expected = lane_sum(comm, [lane(comm.rank)], comm.size, layout=LAYOUT)
        assert np.allclose(out, expected, rtol=1e-6)
        assert out.any()

    local(2, program)


# What is refused.


def refuses(error: type[Exception], words: str, program: Callable[[Communicator], Any], size: int = 2) -> None:
    def rank(comm: Communicator) -> None:
        with pytest.raises(error, match=words):
            program(comm)
        assert comm.allreduce(1) == comm.size  # all have left it together

    local(size, rank)


@pytest.mark.parametrize("op", ["min", "max", "prod", "and", "or"])
def test_refuses_other_reductions(op: str) -> None:
    words = f"allreduce: reproducible=True is for sums; '{op}' .*; expected 'sum' or 'mean'; leave reproducible=True"
    refuses(InputError, words, lambda comm: comm.allreduce(np.ones(2), op, reproducible=True))


X32 = np.ones(2, np.float32)
BAD: dict[str, tuple[type[Exception], str, Callable[[Communicator], Any]]] = {
    "unknown op": (InputError, "unknown reduction; got 'avg'", lambda c: c.reduce(X32, "avg", reproducible=True)),
    "mean of ints": (DtypeError, "'mean' is not defined", lambda c: c.allreduce([1, 2], "mean", reproducible=True)),
    "bool": (DtypeError, "'sum' is not defined", lambda c: c.allreduce(True, reproducible=True)),
    "no root": (InputError, "reduce: no such root; got 9", lambda c: c.reduce(X32, root=9, reproducible=True)),
    "rows": (InputError, "wrong number of rows", lambda c: c.reduce_scatter(np.ones(5), reproducible=True)),
    "algorithm": (InputError, "no such algorithm", lambda c: c.allreduce(X32, algorithm="rign", reproducible=True)),
    "integer lanes": (DtypeError, "lane_sum: lanes are of floats", lambda c: lane_sum(c, [np.ones(2, int)], 2)),
    "no lanes": (InputError, "lane_sum: a rank without lanes needs out=", lambda c: lane_sum(c, [], 2)),
    "lane shape": (InputError, r"a lane has the wrong shape; got \(3,\)", lambda c: lane_sum(c, [X32, np.ones(3)], 4)),
    "lane dtype": (DtypeError, "got float64; expected float32", lambda c: lane_sum(c, [X32, np.ones(2)], 4)),
    "out": (InputError, "out has the wrong shape", lambda c: lane_sum(c, [X32], 2, out=np.ones(3, np.float32))),
    "layout": (InputError, r"does not fit the layout", lambda c: lane_sum(c, [X32], 2, layout=LAYOUT)),
    "float lanes": (InputError, "total_lanes is not an integer; got 2.0", lambda c: lane_sum(c, [X32], 2.0)),  # type: ignore[arg-type]
    "too few": (MismatchError, r"of lanes; got \[1, 1\].*expected 3", lambda c: lane_sum(c, [X32], 3)),
    "differ": (MismatchError, "differs between ranks; got 2 to 3", lambda c: lane_sum(c, [X32], 2 + c.rank)),
    "no lanes at all": (InputError, "total_lanes out of range; got 0", lambda c: lane_sum(c, [X32], 0)),
    "lane op": (InputError, "True is for sums; 'max'", lambda c: lane_sum(c, [X32], 2, op="max")),
    "slack": (InputError, "headroom outside of the slack", lambda c: LaneSum(c, LAYOUT, 2, headroom_bits=13)),
    "added": (InputError, r"LaneSum.add: a lane has the wrong shape", lambda c: LaneSum(c, LAYOUT, 2).add(X32)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refuses(name: str) -> None:
    refuses(*BAD[name])


def test_refuses_a_read_only_out() -> None:
    out = np.ones(2, np.float32)
    out.flags.writeable = False
    refuses(InputError, "lane_sum: out is read-only", lambda comm: lane_sum(comm, [X32], 2, out=out))
    refuses(InputError, "allreduce: out is read-only", lambda comm: comm.allreduce(X32, out=out, reproducible=True))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", INEXACT, ids=str)
def test_non_finite_values_are_named_on_all_ranks(value: float, dtype: Any) -> None:
    def values(comm: Communicator) -> dict[str, np.ndarray]:
        x = np.ones((2, 3), dtype)
        x[1, 2] = value if comm.rank == 1 else 1
        return {"fine": np.ones(4, dtype), "x": x}

    words = (
        rf"allreduce: a value is infinite or not a number; got such values on ranks \[1\], in {np.dtype(dtype)}\[2, 3\]"
    )
    refuses(NonFiniteError, words, lambda comm: comm.allreduce(values(comm), reproducible=True), 3)
    refuses(NonFiniteError, r"on ranks \[1\]", lambda comm: lane_sum(comm, [values(comm)["x"]], 3), 3)


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32", "float64"], ids=str)
def test_a_sum_out_of_range_is_an_error(dtype: Any) -> None:
    x = np.full(2, ml_dtypes.finfo(dtype).max, dtype)
    words = f"a sum is beyond the range of ({np.dtype(dtype)}|float32)"
    refuses(NonFiniteError, words, lambda comm: comm.allreduce(x, reproducible=True))
    refuses(NonFiniteError, words, lambda comm: lane_sum(comm, [x], 2))
    means = local(2, lambda comm: comm.allreduce(x, "mean", reproducible=True))
    assert bits(means[0]) == bits(x)


# Over MPI: the same bits as on threads.


@pytest.mark.mpi
@pytest.mark.parametrize("seed", range(3))
def test_mpi_lanes_have_the_bits_of_one_rank(world: Communicator, seed: int) -> None:
    expected = local(1, sum_any_way, seed)[0]
    assert bits(sum_any_way(world, seed)) == bits(expected)
    assert run_predicted(world, SCALES, seed) == local(1, run_predicted, SCALES, 0)[0]


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", INEXACT, ids=str)
def test_mpi_allreduce_has_the_bits_of_one_rank(world: Communicator, dtype: Any) -> None:
    expected = bits(lane_sum_of([rough(rank, (5, 13), dtype) for rank in range(world.size)]))
    x = rough(world.rank, (5, 13), dtype)
    for algorithm in (None, "default", *algorithms("allreduce")):
        assert bits(world.allreduce(x, algorithm=algorithm, reproducible=True)) == expected
    root = world.size - 1
    at_root = world.reduce(x, root=root, reproducible=True)
    assert at_root is None if world.rank != root else bits(at_root) == expected
    rows = np.stack([x] * world.size)
    assert bits(world.reduce_scatter(rows, reproducible=True)) == expected


@pytest.mark.mpi
def test_mpi_errors_are_agreed(world: Communicator) -> None:
    x = np.array([1.0, np.nan if world.rank == world.size - 1 else 1.0])
    with pytest.raises(NonFiniteError, match=rf"on ranks \[{world.size - 1}\]"):
        world.allreduce(x, reproducible=True)
    with pytest.raises(MismatchError, match="wrong number of lanes"):
        lane_sum(world, [x], world.size + 1)
