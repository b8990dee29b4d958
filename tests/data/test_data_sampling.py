"""Orders of an epoch, and the inverse of the cumulative distribution at its edges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from mpitrain.arrays import Key
from mpitrain.data import SAMPLINGS
from mpitrain.data.sampling import importance, importance_factors, importance_probabilities


@dataclass(frozen=True)
class Fixed:
    """A key whose uniform values are given."""

    values: tuple[float, ...]

    def uniform(self, rows, columns, dtype):
        assert columns == (0, 1)
        return np.array(self.values, dtype)[rows][:, None]


def test_a_row_is_drawn_on_its_half_open_interval():
    probabilities = np.array([0.25, 0.125, 0.5, 0.125])
    below = np.nextafter([0.25, 0.375, 0.875, 1.0], 0)
    assert importance(4, Fixed((0.0, 0.25, 0.375, 0.875)), probabilities).tolist() == [0, 1, 2, 3]
    assert importance(4, Fixed(tuple(below)), probabilities).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("total", [0.1, 0.7, 3.0, 1e-300, 1e300])
def test_the_largest_uniform_value_draws_the_last_row(total):
    largest = 1 - 2.0**-53
    assert importance(3, Fixed((largest,) * 3), np.full(3, total / 3)).tolist() == [2, 2, 2]


def test_probabilities_and_factors():
    probabilities = importance_probabilities(np.array([1, 3, 4]), 3)
    np.testing.assert_allclose(probabilities, [1 / 8, 3 / 8, 1 / 2], rtol=1e-15)
    np.testing.assert_allclose(importance_factors(probabilities), [8 / 3, 8 / 9, 2 / 3], rtol=1e-15)


@pytest.mark.parametrize("unit", [1e308, 5e-324])
def test_weights_of_any_size(unit):
    assert importance_probabilities(np.full(5, unit), 5).tolist() == [0.2] * 5


def test_orders_without_replacement():
    key = Key(1, "shuffle").at(3)
    assert sorted(SAMPLINGS["shuffle"](9, key, None).tolist()) == list(range(9))
    assert SAMPLINGS["sequential"](9, key, None).tolist() == list(range(9))
    assert sorted(SAMPLINGS) == list(SAMPLINGS)
