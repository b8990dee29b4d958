"""Dropout's masks: the same on every layout, of the right frequency, and new in each step and layer."""

import numpy as np
import pytest

from mpitrain import nn
from mpitrain._errors import InputError
from mpitrain.arrays import Key

KEY = Key(4)


def _dropped(layer, x, index, key=KEY):
    y, _ = layer.forward({}, x, nn.Call(training=True, key=key, index=index))
    return y


def test_masks_do_not_depend_on_the_shards():
    x = np.ones((7, 3, 5))
    whole = _dropped(nn.Dropout(0.5), x, np.arange(7))
    for rows in ([6, 0, 3], [1], [2, 4, 5]):
        np.testing.assert_array_equal(_dropped(nn.Dropout(0.5), x[rows], np.array(rows)), whole[rows])


def test_masks_do_not_depend_on_the_dtype():
    x = np.ones((5, 9))
    single = _dropped(nn.Dropout(0.3), x.astype(np.float32), np.arange(5))
    assert single.dtype == np.float32
    np.testing.assert_array_equal(single != 0, _dropped(nn.Dropout(0.3), x, np.arange(5)) != 0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_kept_values_are_scaled_and_as_frequent_as_promised(p):
    y = _dropped(nn.Dropout(p), np.ones((400, 100)), np.arange(400))
    assert set(np.unique(y)) == {0.0, 1.0 / (1.0 - p)}
    deviation = np.sqrt(p * (1 - p) / y.size)
    assert abs((y == 0).mean() - p) < 5 * deviation


def test_steps_layers_and_seeds_differ():
    x, index = np.ones((4, 50)), np.arange(4)
    pair = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    both = _dropped(pair, x, index)
    assert 0.15 < (both != 0).mean() < 0.35  # one mask used twice would keep a half
    base = _dropped(nn.Dropout(0.5), x, index)
    for key in (Key(4).at(1), Key(5), Key(4).child("0")):
        assert (_dropped(nn.Dropout(0.5), x, index, key) != base).any()


def test_evaluation_returns_the_input():
    x = np.ones((3, 2))
    y, context = nn.Dropout(0.5).forward({}, x, nn.Call())
    assert y is x
    assert nn.Dropout(0.5).backward_input({}, context, x, nn.Call()) is x


def test_missing_positions_are_an_error():
    with pytest.raises(
        InputError, match=r"Dropout: the call lacks.*got 2 positions; expected 3 positions; set Batch.index"
    ):
        _dropped(nn.Dropout(0.5), np.ones((3, 2)), np.arange(2))


@pytest.mark.parametrize("p", [1.0, -0.1, "half", True])
def test_wrong_probability_is_named(p):
    with pytest.raises(InputError, match=r"Dropout: p is wrong; got .*; expected a number in \[0, 1\)"):
        nn.Dropout(p)
