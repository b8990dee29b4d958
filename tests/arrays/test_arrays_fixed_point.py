"""Fixed-point sums against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain._errors import InputError, NonFiniteError
from mpitrain.arrays import FixedPoint, Key, Layout, Segment, exponents, fixed_point
from mpitrain.arrays.fixed_point import NON_FINITE, TERMS_MAX, as_reals, cut, zero_exponent

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype("float16"), BFLOAT16, np.dtype("float32"), np.dtype("float64")]
REALS = [np.dtype("float32"), np.dtype("float64")]


def whole(n: int) -> list[tuple[int, slice]]:
    return [(0, slice(0, n))]


def code_of(terms: list[np.ndarray], count: int | None = None) -> FixedPoint:
    found = np.max([exponents(term, whole(term.size), 1) for term in terms], axis=0)
    return FixedPoint(found, count or len(terms))


def summed(terms: list[np.ndarray], count: int | None = None) -> np.ndarray:
    code, total = code_of(terms, count), np.zeros(terms[0].size, np.int64)
    for term in terms:
        code.add(term, whole(term.size), total)
    out = np.full(terms[0].size, np.nan, terms[0].dtype)
    code.decode(total, whole(out.size), out)
    return out


def modelled(terms: list[np.ndarray], code: FixedPoint) -> list[Fraction]:
    """The sum that the docstring promises before its last rounding: multiples of the quantum, ties to even."""
    quantum = Fraction(2) ** (int(code.exponents[0]) - code.bits)
    return [
        sum((round(Fraction(float(term[i])) / quantum) * quantum for term in terms), Fraction(0))
        for i in range(terms[0].size)
    ]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def finite(dtype: np.dtype) -> st.SearchStrategy[float]:
    """Values whose sums of twelve stay in range: subnormal, ordinary and huge."""
    bits = 8 * dtype.itemsize
    limit = float(np.finfo(dtype).max) / 16
    limit = float(dtype.type(limit))
    return st.floats(-limit, limit, width=bits, allow_subnormal=True)


@st.composite
def sums(draw: st.DrawFn) -> list[np.ndarray]:
    dtype = draw(st.sampled_from(REALS))
    n = draw(st.integers(1, 4))
    row = st.lists(finite(dtype), min_size=n, max_size=n)
    return [np.array(values, dtype) for values in draw(st.lists(row, min_size=1, max_size=12))]


@settings(max_examples=300)
@given(sums(), st.randoms(use_true_random=False))
def test_same_bits_in_any_order_and_within_the_bound(terms: list[np.ndarray], random: Any) -> None:
    got, code = summed(terms), code_of(terms)
    assert same_bits(got, summed(random.sample(terms, len(terms))))
    for value, model, column in zip(got, modelled(terms, code), np.array(terms, np.float64).T, strict=True):
        exact = sum(map(Fraction, column.tolist()), Fraction(0))
        assert abs(model - exact) <= Fraction(len(terms)) * Fraction(2) ** (int(code.exponents[0]) - code.bits - 1)
        largest = max(float(abs(term).max()) for term in terms)
        assert abs(model - exact) <= Fraction(len(terms)) / 2**code.bits * Fraction(largest)
        # One rounding: no float of the dtype is nearer to the sum of the integers.
        near = abs(Fraction(float(value)) - model)
        tiny = Fraction(float(np.finfo(got.dtype).smallest_normal))
        for other in (np.nextafter(value, got.dtype.type(s)) for s in (-np.inf, np.inf)):
            if abs(model) >= tiny and math.isfinite(float(other)):
                assert near <= abs(Fraction(float(other)) - model)


@settings(max_examples=200)
@given(sums())
def test_float64_equals_the_model_exactly(terms: list[np.ndarray]) -> None:
    terms = [term.astype(np.float64) for term in terms]
    expected = [float(value) for value in modelled(terms, code_of(terms))]  # Fraction to float rounds once
    got = summed(terms)
    normal = np.abs(expected) >= np.finfo(np.float64).smallest_normal
    assert np.array_equal(got[normal], np.array(expected)[normal])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_integers_are_summed_exactly(dtype: np.dtype) -> None:
    terms = [(np.arange(40) % 7 - 3 + shift).astype(dtype) for shift in range(5)]
    expected = (5 * (np.arange(40) % 7 - 3) + 10).astype(dtype)
    assert same_bits(summed(terms), expected)


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_float_sums_do_depend_on_the_order(dtype: np.dtype) -> None:
    terms = list(Key(3, "terms").tensor((9, 500), ((0, 9), (0, 500)), "normal").astype(dtype))
    orders = [np.random.default_rng(seed).permutation(9) for seed in range(6)]
    assert len({summed([terms[i] for i in order]).tobytes() for order in orders}) == 1
    assert len({sum(terms[i] for i in order).tobytes() for order in orders}) > 1


def test_agrees_with_fsum_on_gradient_like_values() -> None:
    rng = np.random.default_rng(0)
    terms = [rng.standard_normal(2000) * 10.0 ** rng.uniform(-9, 0, 2000) for _ in range(12)]
    exact = np.array([math.fsum(column) for column in np.array(terms).T])
    bound = code_of(terms, 1023).error_bound(12)[0]
    rounding = np.spacing(np.abs(exact)) / 2
    assert np.all(np.abs(summed(terms, 1023) - exact) <= bound + 2 * rounding)
    narrow = [term.astype(np.float32) for term in terms]
    exact = np.array([math.fsum(column) for column in np.array(narrow, np.float64).T])
    bound = code_of(narrow, 1023).error_bound(12)[0]
    rounding = np.spacing(np.abs(exact).astype(np.float32)) / 2
    assert np.all(np.abs(summed(narrow, 1023) - exact) <= bound + rounding)


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 1023, 1024, 65537, TERMS_MAX])
def test_full_terms_cannot_overflow(terms: int) -> None:
    value = np.array([np.nextafter(1.0, 0.0), -np.nextafter(1.0, 0.0)])
    code, total = FixedPoint(np.zeros(1, np.int32), terms), np.zeros(2, np.int64)
    code.add(value, whole(2), total)
    assert abs(int(total[0])) <= 2**code.bits
    assert int(total[0]) == -int(total[1])
    assert terms * 2**code.bits < 2**63
    assert terms * 2 ** (code.bits + 1) >= 2**63  # no bit is wasted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exponents(dtype: np.dtype) -> None:
    info = ml_dtypes.finfo(dtype)
    values = np.array([0, 1, 0.75, -0.5, info.max, info.smallest_subnormal, np.nan, -np.inf], dtype)
    pieces = [(number, slice(number, number + 1)) for number in range(values.size)]
    floor = zero_exponent(dtype)
    expected = [floor, 1, 0, 0, math.frexp(float(info.max))[1], math.frexp(float(info.smallest_subnormal))[1]]
    assert exponents(values, pieces, 9).tolist() == [*expected, NON_FINITE, NON_FINITE, floor]
    assert min(expected[1:]) > floor


def test_exponents_of_parts_and_of_nothing() -> None:
    values = np.array([1.0, 100.0, 0.0, np.nan])
    assert exponents(values, [(0, slice(0, 1)), (0, slice(1, 2))], 1).tolist() == [7]
    assert exponents(values, [(0, slice(0, 3)), (1, slice(3, 4)), (2, slice(2, 2))], 3).tolist() == [
        7,
        NON_FINITE,
        zero_exponent(values.dtype),
    ]
    assert exponents(values[:0], [], 0).shape == (0,)


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_zeros_subnormal_and_huge_values(dtype: np.dtype) -> None:
    info = np.finfo(dtype)
    zeros = np.array([0.0, -0.0], dtype)
    assert same_bits(summed([zeros, -zeros]), np.zeros(2, dtype))
    tiny = np.array([3, -5, 0], dtype) * info.smallest_subnormal
    assert same_bits(summed([tiny, tiny, -tiny], 1023), tiny)
    huge = np.array([info.max, -info.max, info.tiny, info.smallest_subnormal], dtype)
    assert same_bits(summed([huge, -huge, huge], 1023)[:2], huge[:2])
    assert same_bits(summed([huge])[2:], np.zeros(2, dtype))  # as small as that is nothing beside the largest
    step = np.array([1e300, 1e-300]) if dtype.itemsize == 8 else np.array([1e38, 1e-38], dtype)
    apart = FixedPoint(exponents(step, [(0, slice(0, 1)), (1, slice(1, 2))], 2), 1023)
    total, out = np.zeros(2, np.int64), np.empty(2, dtype)
    pieces = [(0, slice(0, 1)), (1, slice(1, 2))]
    apart.add(step, pieces, total)
    apart.decode(total, pieces, out)
    assert same_bits(out, step)


def test_each_tensor_has_its_own_exponent_and_padding_is_left_alone() -> None:
    layout = Layout.build([Segment("big", (3,)), Segment("small", (2, 2)), Segment("none", (0,))], np.float64)
    pieces = layout.whole().pieces
    values = np.full(layout.size, np.nan)
    values[pieces[0][1]], values[pieces[1][1]] = [1e200, -3e200, 2e200], 1e-200
    code = FixedPoint(exponents(values, pieces, len(layout)), 4)
    total, out = np.full(layout.size, 7, np.int64), np.full(layout.size, -1.0)
    for _, part in pieces:
        total[part] = 0
    code.add(values, pieces, total)
    code.decode(total, pieces, out)
    inside = np.zeros(layout.size, bool)
    for _, part in pieces:
        inside[part] = True
        assert np.array_equal(out[part], values[part])
    assert np.all(total[~inside] == 7)
    assert np.all(out[~inside] == -1)
    assert np.all(code.error_bound(4)[:2] < 1e-17 * np.array([3e200, 1e-200]))


def test_chunks_and_cuts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    terms = [rng.standard_normal(50).astype(np.float32) for _ in range(3)]
    expected = summed(terms)
    monkeypatch.setattr(fixed_point, "CHUNK_SIZE", 7)
    assert same_bits(summed(terms), expected)
    code, total = code_of(terms), np.zeros(50, np.int64)
    for start, stop in [(0, 13), (13, 14), (14, 50)]:
        for term in terms:
            code.add(term[start:stop], cut(whole(50), start, stop), total[start:stop])
    out = np.empty(50, np.float32)
    code.decode(total, whole(50), out)
    assert same_bits(out, expected)
    assert cut([(0, slice(0, 4)), (1, slice(6, 9))], 3, 7) == [(0, slice(0, 1)), (1, slice(3, 4))]
    assert cut([(0, slice(0, 4))], 4, 9) == []


def test_a_mean_is_the_rounded_sum_divided_once() -> None:
    rng = np.random.default_rng(2)
    for dtype in REALS:
        terms = [rng.standard_normal(300).astype(dtype) for _ in range(7)]
        code, total = code_of(terms), np.zeros(300, np.int64)
        for term in terms:
            code.add(term, whole(300), total)
        out = np.empty(300, dtype)
        code.decode(total, whole(300), out, divisor=7)
        assert same_bits(out, summed(terms) / dtype.type(7))


def test_the_mean_of_the_largest_floats_is_finite() -> None:
    huge = np.full(2, np.finfo(np.float32).max)
    code, total = code_of([huge, huge]), np.zeros(2, np.int64)
    code.add(huge, whole(2), total)
    code.add(huge, whole(2), total)
    out = np.empty_like(huge)
    code.decode(total, whole(2), out, divisor=2)
    assert same_bits(out, huge)
    with pytest.raises(NonFiniteError, match="a sum is beyond the range of float32; scale the terms down"):
        code.decode(total, whole(2), out)


def test_a_half_result_out_of_range_is_an_error() -> None:
    with pytest.raises(NonFiniteError, match="beyond the range of float16"):
        summed([np.full(3, 4e4, np.float16)] * 2)


def test_complex_arrays_are_reals() -> None:
    values = np.array([1 + 2j, 3 - 4j], np.complex64)
    reals = as_reals(values)
    assert reals.dtype == np.float32
    assert reals.tolist() == [1, 2, 3, -4]
    assert np.shares_memory(reals, values)
    assert as_reals(reals) is reals


@pytest.mark.parametrize("value", [np.nextafter(1.0, 2.0), -1.5, np.nan, np.inf, -1e300])
def test_a_value_that_the_exponent_does_not_fit_is_refused(value: float) -> None:
    code = FixedPoint(np.zeros(1, np.int32), 3)
    with pytest.raises(InputError, match=r"a value is beyond 2\*\*exponent"):
        code.add(np.array([0.5, value]), whole(2), np.zeros(2, np.int64))


def test_refuses_terms_and_exponents() -> None:
    for terms in (0, -1, TERMS_MAX + 1):
        with pytest.raises(InputError, match=f"number of terms; got {terms}; expected 1 to {TERMS_MAX}"):
            FixedPoint(np.zeros(1, np.int32), terms)
    with pytest.raises(NonFiniteError, match=r"tensors number \[1\]"):
        FixedPoint(np.array([0, NON_FINITE], np.int32), 1)
