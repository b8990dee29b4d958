"""What top-k chooses, against a full sort."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mpitrain._errors import InputError
from mpitrain.arrays import Key, Layout, Segment
from mpitrain.comm.codecs import TopK, topk

N = 40_000
RNG = np.random.default_rng(0)
DATA: dict[str, np.ndarray] = {
    "normal": RNG.standard_normal(N),
    "few": np.where(np.arange(N) % 1000 == 7, RNG.standard_normal(N), 0.0),
    "zeros": np.zeros(N),
    "equal": np.full(N, -3.0),
    "ties": RNG.integers(-5, 6, N).astype(float),
    "heavy tails": RNG.standard_cauchy(N) ** 3,
    "sample sees the small": np.where(np.arange(N) % topk._STRIDE == 0, 0.0, RNG.standard_normal(N)),
    "sample sees the large": np.where(np.arange(N) % topk._STRIDE == 0, 9.0, 1.0) * RNG.standard_normal(N),
    "sorted": np.sort(RNG.standard_normal(N)),
    "infinite": np.where(RNG.random(N) < 0.03, np.inf, RNG.standard_normal(N)),
    "NaN": np.where(RNG.random(N) < 1e-3, -np.nan, RNG.standard_normal(N)),
}


def check(values: np.ndarray, count: int) -> None:
    """The sizes chosen are the last of all in order; a NaN is larger than any."""
    chosen = topk.largest(values, count)
    assert len(set(chosen.tolist())) == count
    order = np.sort(np.abs(values))  # NaN last
    assert np.array_equal(np.sort(np.abs(values[chosen])), order[len(order) - count :], equal_nan=True)


def test_more_elements_than_indices_are_refused() -> None:
    def layout(last: int) -> Layout:
        return Layout.build([Segment("a", (1 << 31,)), Segment("b", (last,))])

    assert TopK().init(layout(1 << 31), Key(0)) == {}
    with pytest.raises(InputError, match="4,294,967,312; expected at most 4,294,967,296"):
        TopK().init(layout((1 << 31) + 1), Key(0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ratio", [1e-5, 0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("data", DATA)
def test_the_largest_are_chosen(data: str, ratio: float, dtype: Callable[..., np.ndarray]):
    check(DATA[data].astype(dtype), max(1, round(ratio * N)))


@given(
    values=arrays.arrays(np.float32, st.integers(1, 400), elements=st.floats(width=32)),
    ratio=st.floats(0, 1, exclude_min=True),
)
def test_any_values_are_sorted_as_numpy_sorts_them(values: np.ndarray, ratio: float):
    check(values, max(1, round(ratio * len(values))))


def orders(values: np.ndarray, count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many values are put in order while ``count`` of them are chosen."""
    seen, last = [], topk._last
    monkeypatch.setattr(topk, "_last", lambda sizes, count: seen.append(len(sizes)) or last(sizes, count))
    topk.largest(values, count)
    return seen


def test_a_sample_spares_most_of_the_order(monkeypatch: pytest.MonkeyPatch):
    (ordered,) = orders(DATA["normal"].astype(np.float32), N // 100, monkeypatch)
    assert N // 100 <= ordered < N // 20


def test_a_sample_unlike_the_rest_costs_the_whole_order(monkeypatch: pytest.MonkeyPatch):
    assert orders(DATA["sample sees the large"].astype(np.float32), N // 100, monkeypatch)[-1] == N
