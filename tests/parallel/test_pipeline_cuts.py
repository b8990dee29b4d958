"""Where a model is cut: the best cuts there are, between layers, by what these cost; and its parts are the whole."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parallel_cases import IMAGES, SHAPE, TEXT, RowsFeed, cnn, gpt, mlp

from mpitrain import nn
from mpitrain._errors import InputError
from mpitrain.arrays import FlatBuffer, Key
from mpitrain.nn.cutting import part, units
from mpitrain.parallel.pipeline import counted, measured, partition


@given(costs=st.lists(st.integers(0, 9), min_size=1, max_size=9), data=st.data())
def test_the_largest_part_is_as_small_as_any_cuts_allow(costs, data):
    parts = data.draw(st.integers(1, len(costs)))

    def largest(cuts: tuple[int, ...]) -> int:
        return max(sum(costs[start:stop]) for start, stop in pairwise(cuts))

    every = ((0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), parts - 1))
    cuts = partition(costs, parts)
    assert (cuts[0], cuts[-1], len(cuts)) == (0, len(costs), parts + 1)
    assert all(start < stop for start, stop in pairwise(cuts))
    assert largest(cuts) == min(largest(each) for each in every)


@pytest.mark.parametrize("parts", [0, 4])
def test_more_stages_than_layers_are_refused(parts):
    with pytest.raises(InputError, match=f"cannot be cut into so many stages; got {parts} stages, 3 layers"):
        partition([1, 1, 1], parts)


def test_a_block_is_two_units():
    assert [path for path, _ in units(gpt().layer)] == [
        "tokens", "positions", "dropout", "block0.attention", "block0.mlp", "block1.attention", "block1.mlp", "norm",
        "head",
    ]  # fmt: skip
    assert [path for path, _ in units(mlp().layer)] == ["0", "1", "2", "3"]


def test_a_subclass_that_computes_otherwise_is_one_unit():
    class Twice(nn.Sequential):
        def forward(self, params, x, call):
            return super().forward(params, 2 * x, call)

    assert [path for path, _ in units(nn.Sequential(nn.ReLU(), Twice(nn.ReLU(), nn.ReLU())))] == ["0", "1"]


@pytest.mark.parametrize(("build", "inputs"), [(mlp, IMAGES.inputs), (cnn, IMAGES.inputs), (gpt, TEXT.inputs)])
def test_the_parts_one_after_another_are_the_whole(build, inputs):
    """Names of parameters and random streams are those of the whole, wherever it is cut: the bits are the same."""
    network = build()
    params = FlatBuffer(network.layout)
    network.initialise(params, Key(1))
    call = nn.Call(training=True, key=Key(2), index=np.arange(len(inputs)))
    x = network.prepared_inputs(np.asarray(inputs), params)
    whole, _ = network.layer.forward(params.tree, x, call)
    paths = [path for path, _ in units(network.layer)]
    count = len(paths)
    for cut in range(1, count):
        parts = [part(network.layer, 0, cut), part(network.layer, cut, count)]
        assert [[path for path, _ in units(each)] for each in parts] == [paths[:cut], paths[cut:]]
        middle, _ = parts[0].forward(params.tree, x, call)
        np.testing.assert_array_equal(parts[1].forward(params.tree, middle, call)[0], whole)
        names = [each.name for layer in parts for each in layer.parameters()]
        assert names == [each.name for each in network.layer.parameters()]


def test_counted_work_is_that_of_the_matrix_products():
    values = 8  # what a value that is written counts
    assert counted(mlp(), SHAPE) == [32 * values, 32 * 5 + 5 * values, 5 * values, 5 * 3 + 3 * values]
    t, width, hidden, vocabulary = 6, 8, 12, 4
    tokens, positions, dropout, attention, perceptron, *_, norm, head = counted(gpt(), (t,))
    row = t * width * values
    assert tokens == positions == dropout == norm == row
    qkv, out = width * 3 * width * t, width * width * t
    assert attention == qkv + out + t * t * width + 8 * row  # norm, qkv (3), heads, out, dropout, the sum
    assert perceptron == 2 * width * hidden * t + 4 * row + 2 * t * hidden * values
    assert head == width * vocabulary * t + t * vocabulary * values
    first, *_ = counted(cnn(), SHAPE)
    assert first == 3 * 3 * 2 * 3 * 16 + 4 * 4 * 3 * values


def test_measured_times_are_of_each_unit():
    network = gpt(np.float32)
    times = measured(network, RowsFeed(TEXT, dtype=np.float32).whole(0)[0], repeats=2)
    assert len(times) == len(units(network.layer))
    assert all(each.total_s == each.forward_s + each.backward_input_s + each.backward_weight_s for each in times)
    assert all(each.forward_s > 0 for each in times)
