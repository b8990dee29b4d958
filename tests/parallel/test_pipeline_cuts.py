"""Where a model is cut: the best cuts there are, between layers, by what these cost; and its parts are the whole."""

from __future__ import annotations

import time
from collections import Counter
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parallel_cases import IMAGES, SHAPE, TEXT, RowsFeed, cnn, gpt, mlp, plan

from mpitrain import nn
from mpitrain._errors import InputError
from mpitrain.arrays import Batch, FlatBuffer, Key
from mpitrain.comm import LocalWorld
from mpitrain.nn.cutting import part, units
from mpitrain.optim import SGD
from mpitrain.parallel import GradientPipelineParallel, PipelineParallel, ReproduciblePipelineParallel
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


def set_up(layers: int, **options: Any) -> tuple[int, ...]:
    network = nn.Network(nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers))), nn.MeanSquaredError())

    def cuts(comm):
        method = PipelineParallel(comm, **options)
        method.setup(network, SGD(), plan(1))
        return method.cuts

    return LocalWorld(3, timeout_s=10).run(cuts)[0]


def test_the_caller_says_where_to_cut():
    assert set_up(5, cuts=[1, 4]) == (1, 4)
    assert set_up(5, costs=[1, 1, 1, 1, 9]) == (2, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cuts": [1]},
            r"not make 3 stages of 4 layers; got \[1\]; expected 2 ascending numbers of layers from 1 to 3",
        ),
        ({"cuts": [2, 2]}, r"do not make 3 stages of 4 layers; got \[2, 2\]"),
        ({"cuts": [2, 4]}, r"do not make 3 stages of 4 layers; got \[2, 4\]"),
        ({"cuts": [0, 2]}, "one of cuts is too small; got 0; expected at least 1"),
        ({"cuts": [1.5, 2]}, "one of cuts is not an integer; got 1.5"),
        ({"cuts": [1, 2], "costs": [1] * 4}, "balanced by costs or cut by cuts; got 4 costs, 2 cuts"),
    ],
)
def test_cuts_that_do_not_fit_are_said(options, message):
    with pytest.raises(InputError, match=message):
        set_up(4, **options)


@pytest.mark.parametrize("make", [GradientPipelineParallel, ReproduciblePipelineParallel])
def test_so_do_other_pipelines_cut(make):
    def cuts(comm):
        method = make(comm, cuts=[2], **({"lanes": 2} if make is ReproduciblePipelineParallel else {}))
        method.setup(mlp(), SGD(), plan(1))
        return method.cuts

    assert LocalWorld(2, timeout_s=10).run(cuts) == [(2,)] * 2


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


class Slow(nn.Layer):
    """Takes so many milliseconds forward, and those for the gradients of its input and of its weight."""

    def __init__(self, *times_ms: float, trained: bool = True) -> None:
        self.times_ms, self.trained, self.calls = times_ms, trained, Counter[str]()

    def parameters(self):
        return nn.Linear(2, 2, bias=False).parameters() if self.trained else ()

    def take(self, number: int, name: str, rows: int) -> None:
        if rows:
            self.calls[name] += 1
            time.sleep(self.times_ms[number] / 1e3)

    def forward(self, params, x, call):
        self.take(0, "forward", len(x))
        return x, call.context()

    def backward_input(self, params, context, dy, call):
        self.take(1, "input", len(dy))
        return dy

    def backward_weight(self, grads, context, dy, call):
        self.take(2, "weight", len(dy))


def slow() -> tuple[nn.Network, list[Slow]]:
    """What is in front of the first weights needs no gradient, and the input of these needs none."""
    layers = [Slow(8, 50, 50, trained=False), Slow(2, 50, 4), Slow(3, 6, 0), Slow(1, 2, 3)]
    return nn.Network(nn.Sequential(*layers[:2], nn.Sequential(*layers[2:])), nn.MeanSquaredError()), layers


PAIRS = Batch(np.ones((3, 2)), np.ones((3, 2)), np.arange(3))
TAKEN_MS = [(8, 0, 0), (2, 0, 4), (3, 6, 0), (1, 2, 3)]


@pytest.mark.parametrize("only", [None, [1], [0, 3], [1, 2], [2]])
def test_measured_times_are_those_of_the_layers(only):
    network, layers = slow()
    found = measured(network, PAIRS, repeats=2, only=only)
    numbers = range(4) if only is None else only
    for number, times in zip(numbers, found, strict=True):
        spent_ms = [1e3 * each for each in (times.forward_s, times.backward_input_s, times.backward_weight_s)]
        least = TAKEN_MS[number]
        assert all(own <= spent for own, spent in zip(least, spent_ms, strict=True)), spent_ms
        assert times.total_s == pytest.approx(sum(spent_ms) / 1e3)
        expected = {name: 3 for name, own in zip(("forward", "input", "weight"), least, strict=True) if own}
        assert expected.items() <= layers[number].calls.items()
    assert not any(layers[number].calls for number in {*range(4)} - {*numbers})
    assert not layers[0].calls["input"]
    assert not layers[0].calls["weight"]
    assert not layers[1].calls["input"]


@pytest.mark.parametrize("dtype", [None, np.float16])
@pytest.mark.parametrize(("build", "data"), [(mlp, IMAGES), (cnn, IMAGES), (gpt, TEXT)])
def test_units_are_measured_without_the_others(build, data, dtype):
    """Whatever is in front of them and behind them is made up in the right shapes; a tied tensor's alias too."""
    network, batch = build(np.float32), RowsFeed(data, dtype=np.float32).whole(0)[0]
    count = len(units(network.layer))
    for only in (None, [0], [count - 1], *([n, n + 1] for n in range(count - 1)), [0, count - 1]):
        found = measured(network, batch, repeats=1, only=only, dtype=dtype)
        assert len(found) == (count if only is None else len(only))
        assert all(0 < each.forward_s <= each.total_s for each in found)
