"""An array that was lent is known to be held for as long as anything looks at its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpitrain.arrays.dtypes import half
from mpitrain.arrays.loans import Loans


@pytest.fixture
def memory() -> np.ndarray:
    return np.arange(12.0)


@pytest.fixture
def loans(memory) -> Loans:
    return Loans({"a": memory[:6].reshape(2, 3), "b": memory[6:], "empty": memory[3:3].reshape(0, 4)}, np)


def test_what_is_lent_is_the_memory_itself(memory, loans):
    lent = loans.lend("a")
    lent[1, 2] = -1
    assert memory[5] == -1
    assert (lent.shape, lent.dtype, loans.lend("empty").shape) == ((2, 3), memory.dtype, (0, 4))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "bool", "int64"])
def test_what_is_lent_has_its_type(name):
    memory = np.arange(6).astype(half(name, "test"))
    loans = Loans({"a": memory[2:].reshape(2, 2)}, np)
    lent = loans.lend("a")
    assert (lent.dtype, lent.shape) == (memory.dtype, (2, 2))
    lent[0, 1] = 0
    assert memory.astype(int).tolist() == (np.arange(6).astype(memory.dtype).astype(int) * [1, 1, 1, 0, 1, 1]).tolist()
    view = lent[1]
    del lent
    assert loans.held(["a"]) == ["a"]
    del view
    assert loans.held(["a"]) == []


def torch_tensor(lent: np.ndarray) -> Any:
    return pytest.importorskip("torch").from_numpy(lent)


HOLDERS = {
    "itself": lambda lent: lent,
    "an element's view": lambda lent: lent[1:, 2],
    "a view of a view": lambda lent: lent.T[1:][:, 1],
    "a memoryview": memoryview,
    "a tensor of PyTorch's": torch_tensor,
    "an empty view": lambda lent: lent[:0],
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS.keys())
def test_it_is_held_for_as_long_as_a_view_of_it(loans, hold: Callable[[np.ndarray], Any]):
    holder = hold(loans.lend("a"))
    assert loans.held(["a", "b"]) == ["a"]
    assert loans.held(["b"]) == []
    second = loans.lend("a")
    del holder
    assert loans.held(["a"]) == ["a"]
    del second
    assert loans.held(["a"]) == []


def test_copies_and_results_hold_nothing(loans):
    kept = [loans.lend("a").copy(), loans.lend("a") @ np.ones(3), loans.lend("a").reshape(-1)[[0, 1]]]
    assert loans.held(["a"]) == []
    assert len(kept) == 3


def test_a_cycle_that_nobody_reaches_holds_nothing(loans):
    cycle: list[Any] = [loans.lend("a")]
    cycle.append(cycle)
    assert loans.held(["a"]) == ["a"]
    del cycle
    assert loans.held(["a"]) == []
