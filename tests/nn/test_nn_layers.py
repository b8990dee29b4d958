"""Layers: closed forms, dtypes, initial values, and bad options and inputs."""

import numpy as np
import pytest

from mpitrain import nn
from mpitrain._errors import DataError, InputError
from mpitrain.arrays import FlatBuffer, Key, Layout, Segment
from mpitrain.nn.initial import he_uniform, normal, zeros
from mpitrain.nn.layout import layout_of


def _forward(layer, x, params=None):
    return layer.forward(params or {}, np.asarray(x), nn.Call())[0]


def test_convolution_of_integers_is_exact():
    x = np.arange(2 * 4 * 4 * 2, dtype=np.float32).reshape(2, 4, 4, 2)
    kernel = np.arange(3 * 2 * 2 * 3, dtype=np.float32).reshape(3, 2, 2, 3)
    y = _forward(nn.Conv2d(2, 3, (3, 2), bias=False), x, {"weight": kernel})
    expected = np.zeros((2, 2, 3, 3))
    for n, i, j in np.ndindex(2, 2, 3):
        expected[n, i, j] = np.tensordot(x[n, i : i + 3, j : j + 2], kernel, axes=3)
    np.testing.assert_array_equal(y, expected)


def test_convolution_in_many_blocks_is_the_same(monkeypatch):
    random = np.random.default_rng(0)
    x, kernel = random.integers(-4, 5, (7, 5, 5, 2)).astype(float), random.integers(-4, 5, (3, 3, 2, 3)).astype(float)
    dy = random.integers(-4, 5, (7, 5, 5, 3)).astype(float)
    layer = nn.Conv2d(2, 3, 3, padding=1)
    bias = np.array([5.0, -3.0, 2.0])
    block_bytes = 2 * 25 * 18 * 8  # of patches of the input, of two samples
    params = {"weight": kernel, "bias": bias}

    def all_passes():
        call = nn.Call()
        y, context = layer.forward(params, x, call)
        dx = layer.backward_input(params, context, dy, call)
        grads = {"weight": np.zeros_like(kernel), "bias": np.zeros_like(bias)}
        layer.backward_weight(grads, context, dy, call)
        return y.copy(), dx.copy(), grads["weight"]

    whole = all_passes()
    monkeypatch.setattr("mpitrain.nn.conv._BLOCK_BYTES", block_bytes)
    for found, expected in zip(all_passes(), whole, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert np.sum((whole[0] - bias) * dy) == np.sum(x * whole[1])  # <A x, dy> = <x, Aᵀ dy>, in integers


def test_pooling_closed_forms():
    x = np.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(_forward(nn.MaxPool2d(2), x)[0, :, :, 0], [[5, 7], [13, 15]])
    np.testing.assert_array_equal(_forward(nn.AvgPool2d(2), x)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])


def test_first_of_equal_maxima_gets_the_gradient():
    layer, call = nn.MaxPool2d(2), nn.Call()
    _, context = layer.forward({}, np.zeros((1, 2, 2, 1)), call)
    dx = layer.backward_input({}, context, np.full((1, 1, 1, 1), 3.0), call)
    np.testing.assert_array_equal(dx[0, :, :, 0], [[3, 0], [0, 0]])


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.GELU(), nn.Tanh(), nn.Sigmoid(), nn.MaxPool2d(1), nn.MaxPool2d(2)])
def test_nan_is_passed_on(layer):
    x = np.zeros((1, 2, 2, 1))
    x[0, 1, 1, 0] = np.nan
    assert np.isnan(_forward(layer, x)).any()


def test_activations_at_known_points():
    x = np.array([[-800.0, -1.0, 0.0, 1.0, 800.0]])
    np.testing.assert_array_equal(_forward(nn.ReLU(), x), [[0, 0, 0, 1, 800]])
    np.testing.assert_allclose(_forward(nn.Sigmoid(), x), [[0, 1 / (1 + np.e), 0.5, np.e / (1 + np.e), 1]], rtol=1e-15)
    exact = [[0, -0.15865525393145707, 0, 0.8413447460685429, 800]]
    np.testing.assert_allclose(_forward(nn.GELU(), x), exact, atol=5e-4)
    assert _forward(nn.Sigmoid(), [[-40.0]])[0, 0] == pytest.approx(np.exp(-40.0), rel=1e-12)


def test_embedding_adds_up_repeated_numbers():
    layer, call = nn.Embedding(4, 2), nn.Call()
    _, context = layer.forward({"weight": np.zeros((4, 2))}, np.array([2, 0, 2, 2]), call)
    grads = {"weight": np.ones((4, 2))}
    layer.backward_weight(grads, context, np.array([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0], [64.0, 128.0]]), call)
    np.testing.assert_array_equal(grads["weight"], [[5, 9], [1, 1], [82, 163], [1, 1]])


@pytest.mark.parametrize("length", [1, 5, 64, 65, 130])
def test_attention_that_prefers_nothing_gives_the_mean_of_the_past(length):
    values = np.random.default_rng(0).integers(-8, 9, (3, length, 2, 1, 4)).astype(float)  # n, t, heads, 1, size
    x = np.concatenate([np.zeros_like(values), values, values], axis=3).reshape(3, length, 24)
    means = values.cumsum(axis=1) / np.arange(1, length + 1)[:, None, None, None]
    np.testing.assert_allclose(_forward(nn.CausalAttention(2), x), means.reshape(3, length, 8), rtol=1e-14)


def test_attention_of_large_scores_takes_the_best_of_the_past_and_overflows_nowhere():
    keys = np.array([300.0, 100.0, 900.0, 500.0])
    x = np.stack([np.full(4, 1e3), keys, np.arange(4.0)], axis=-1)[None]
    np.testing.assert_array_equal(_forward(nn.CausalAttention(1), x)[0, :, 0], [0, 0, 2, 2])


def test_attention_sees_nothing_of_the_future():
    layer, x = nn.CausalAttention(2), np.random.default_rng(0).standard_normal((2, 90, 12))
    before = _forward(layer, x)
    x[:, 70:] *= 1000
    after = _forward(layer, x)
    np.testing.assert_array_equal(after[:, :70], before[:, :70])
    assert (after[:, 70:] != before[:, 70:]).all()


def test_he_uniform_bounds_and_spread():
    segment = Segment("weight", (300, 200))
    values = he_uniform(300)(Key(0), segment)
    bound = np.sqrt(6 / 300)
    assert values.min() >= -bound
    assert values.max() < bound
    assert values.var() == pytest.approx(2 / 300, rel=0.02)
    assert abs(values.mean()) < 5 * np.sqrt(2 / 300 / values.size)


@pytest.mark.parametrize("initialiser", [he_uniform(6), normal(0.5)])
def test_initial_values_do_not_depend_on_the_box(initialiser):
    whole = initialiser(Key(2), Segment("w", (6, 8)))
    part = initialiser(Key(2), Segment("w", (6, 8), ((1, 4), (3, 7))))
    np.testing.assert_array_equal(part, whole[1:4, 3:7])


def test_normal_spread():
    assert normal(0.5)(Key(1), Segment("w", (200, 200))).std() == pytest.approx(0.5, rel=0.02)


def test_names_groups_and_shapes():
    net = nn.Sequential(nn.Linear(4, 3), nn.Residual(nn.Sequential(nn.LayerNorm(3)), nn.Linear(3, 3, bias=False)))
    layout = Layout.build([p.segment() for p in net.parameters()])
    assert {s.name: (s.shape, s.group) for s in layout} == {
        "0.weight": ((4, 3), "decay"),
        "0.bias": ((3,), "no_decay"),
        "1.inner.0.gamma": ((3,), "no_decay"),
        "1.inner.0.beta": ((3,), "no_decay"),
        "1.shortcut.weight": ((3, 3), "decay"),
    }


def test_gpt_names_groups_and_ties():
    gpt = nn.GPT(7, context=5, layers=1, width=4, heads=2, dropout=0.1)
    assert [name for name, _ in gpt.children] == ["tokens", "positions", "dropout", "block0", "norm", "head"]
    layout = layout_of(nn.Sequential(nn.Sequential(gpt)), np.float32)
    assert layout.ties == {"0.0.head.weight": "0.0.tokens.weight"}
    decaying = {s.name.removeprefix("0.0."): s.shape for s in layout if s.group == "decay"}
    assert decaying == {
        "block0.attention.inner.qkv.weight": (4, 12),
        "block0.attention.inner.out.weight": (4, 4),
        "block0.mlp.inner.up.weight": (4, 16),
        "block0.mlp.inner.down.weight": (16, 4),
    }
    params = FlatBuffer(layout)
    assert params.views["0.0.head.weight"] is params.views["0.0.tokens.weight"]
    untied = layout_of(nn.GPT(7, context=5, layers=1, width=4, heads=2, tied=False), np.float32)
    assert untied["head.weight"].group == "decay"
    assert (untied.ties, untied.parameter_count - layout.parameter_count) == ({}, 7 * 4)


def test_gpt_starts_near_the_uniform_distribution():
    net = nn.Network(nn.GPT(50, context=16, layers=3, width=32, heads=4), nn.CrossEntropy(), "float64")
    params = FlatBuffer(net.layout)
    net.initialise(params, Key(0))
    spread = {name: params.views[f"block1.{name}.weight"].std() for name in ("mlp.inner.up", "mlp.inner.down")}
    assert spread == pytest.approx({"mlp.inner.up": 0.02, "mlp.inner.down": 0.02 / np.sqrt(6)}, rel=0.05)
    scores = net.predict(params, np.random.default_rng(0).integers(0, 50, (4, 16)))
    assert np.abs(scores).max() < 1.0


class _Mistied(nn.Sequential):
    def ties(self):
        return {"0.weight": "1.weight"}


def test_a_tie_of_two_shapes_is_refused():
    with pytest.raises(InputError, match=r"'0.weight' cannot be tied to '1.weight'; got .*\(2, 3\), \(3, 2\)"):
        layout_of(_Mistied(nn.Linear(2, 3), nn.Linear(3, 2)), np.float32)


class _Twice(nn.Layer):
    def parameters(self):
        return [nn.Parameter("weight", (3, columns), zeros) for columns in (3, 2)]

    def forward(self, params, x, call):
        raise NotImplementedError

    def backward_input(self, params, context, dy, call):
        raise NotImplementedError


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(InputError, match="two tensors have one name; got weight"):
        layout_of(_Twice(), np.float32)
    with pytest.raises(InputError, match=r"Sequential: a layer's name has a dot in it; got 'a\.b'"):
        nn.Sequential(**{"a.b": nn.Linear(3, 2)})


@pytest.mark.parametrize("shape", [(1, 4, 4, 2), (1, 2, 2, 2), (1, 3, 3, 1), (2, 3, 3, 2)])
def test_a_convolution_refuses_a_gradient_of_another_shape(shape):
    layer, call = nn.Conv2d(1, 2, 3, padding=1), nn.Call()
    params = {"weight": np.ones((3, 3, 1, 2)), "bias": np.zeros(2)}
    grads = {name: np.zeros_like(value) for name, value in params.items()}
    _, context = layer.forward(params, np.ones((1, 3, 3, 1)), call)
    with pytest.raises(InputError, match="Conv2d: the gradient is not of the output's shape"):
        layer.backward_weight(grads, context, np.ones(shape), call)
    with pytest.raises(InputError, match="Conv2d: the gradient is not of the output's shape"):
        layer.backward_input(params, context, np.ones(shape), call)


def test_context_release_may_be_repeated():
    pool = nn.Pool()
    context = nn.Context(pool)
    context.take((3,), np.dtype(float))
    context.release()
    context.release()
    first, second = (pool.take((3,), np.dtype(float)) for _ in range(2))
    assert first is not second
    assert pool.misses == 2


def test_pool_lets_go_of_shapes_that_come_and_go():
    pool = nn.Pool()
    for size in range(1000, 1100):
        for array in [pool.take((size,), np.dtype(float)) for _ in range(3)]:
            pool.give(array)
    assert pool.nbytes < 6 * 3 * 1100 * 8


def test_pool_keeps_a_few_shapes_that_take_turns():
    pool = nn.Pool()
    for _ in range(10):
        for size in (1000, 600, 900):
            for array in [pool.take((size,), np.dtype(float)) for _ in range(3)]:
                pool.give(array)
    assert pool.misses == 9


def test_pool_keeps_shapes_and_dtypes_apart():
    pool = nn.Pool()
    lent = pool.take((2, 3), np.dtype(np.float32))
    pool.give(lent)
    assert pool.take((2, 3), np.dtype(np.float64)) is not lent
    assert pool.take((3, 2), np.dtype(np.float32)) is not lent
    assert pool.take((2, 3), np.dtype(np.float32)) is lent


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(0, 3), "Linear: inputs is wrong; got 0; expected a whole number of at least 1"),
        (lambda: nn.Linear(2, "ten"), "Linear: outputs is wrong; got 'ten'"),
        (lambda: nn.Conv2d(1, 2, (3, 3, 3)), r"Conv2d: kernel_size is wrong; got \(3, 3, 3\); expected .*two"),
        (lambda: nn.Conv2d(1, 2, 3, padding=-1), "Conv2d: padding is wrong; got -1; expected .* at least 0"),
        (lambda: nn.Conv2d(1, 2, 3, stride=0), "Conv2d: stride is wrong; got 0"),
        (lambda: nn.MaxPool2d(2.5), "MaxPool2d: kernel_size is wrong; got 2.5"),
        (lambda: nn.AvgPool2d(2, stride=True), "AvgPool2d: stride is wrong; got True"),
        (lambda: nn.LayerNorm(2, eps=-1), r"LayerNorm: eps is wrong; got -1; expected a number in \[1e-30, inf\)"),
        (lambda: nn.LayerNorm(2, eps=1e-50), "LayerNorm: eps is wrong; got 1e-50"),
        (lambda: nn.BatchNorm(2, eps=1e-50), "BatchNorm: eps is wrong; got 1e-50"),
        (lambda: nn.LayerNorm(2, eps=float("inf")), "LayerNorm: eps is wrong; got inf"),
        (lambda: nn.BatchNorm(2, momentum="0.1"), r"momentum is wrong; got '0.1'; expected a number in \[0, 1\]"),
        (lambda: nn.BatchNorm(2, momentum=True), "BatchNorm: momentum is wrong; got True"),
        (lambda: nn.Dropout(1), r"Dropout: p is wrong; got 1; expected a number in \[0, 1\)"),
        (lambda: nn.Embedding(3, 0), "Embedding: features is wrong"),
        (lambda: nn.CrossEntropy(label_smoothing=1), "CrossEntropy: label_smoothing is wrong; got 1"),
        (lambda: nn.CrossEntropy(0.1, "byte"), "with smoothing, the loss is not the length of a code; got unit 'byte'"),
        (lambda: nn.Linear(2, 3, std=0), "Linear: std is wrong; got 0"),
        (lambda: nn.CausalAttention(0), "CausalAttention: heads is wrong; got 0"),
        (lambda: nn.GPT(5, 4, width=6, heads=4), "GPT: width is not a multiple of heads; got 6 and 4"),
        (lambda: nn.GPT(5, 4, layers=0), "GPT: layers is wrong; got 0"),
        (lambda: nn.GPT(5, 4, dropout=None), "Dropout: p is wrong; got None"),
        (
            lambda: nn.Linear(int, 3),
            "Linear: inputs is wrong; got <class 'int'>; expected a whole number of at least 1",
        ),
        (lambda: nn.Linear(np.array([1, 2]), 3), r"Linear: inputs is wrong; got array\(\[1, 2\]\)"),
        (
            lambda: nn.CrossEntropy(unit=1),
            "CrossEntropy: unit is of another kind; got int: 1; expected what a token is",
        ),
        (
            lambda: nn.Network(nn.Linear(2, 2), nn.CrossEntropy(), None),
            "network: not a dtype; got None; expected float",
        ),
        (lambda: nn.Recompute(None), "Recompute: layer is of another kind; got NoneType"),
    ],
)
def test_wrong_options_are_named(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_options_may_be_numbers_of_numpy():
    assert nn.Dropout(np.float32(0.25)).p == 0.25
    assert nn.LayerNorm(np.int64(2), eps=np.float32(0.5)).eps == 0.5
    assert nn.BatchNorm(2, momentum=np.float16(0.5)).momentum == 0.5


def _params(layer):
    return FlatBuffer(Layout.build([p.segment() for p in layer.parameters()], np.float64)).tree


@pytest.mark.parametrize(
    ("layer", "x", "error", "message"),
    [
        (nn.Linear(4, 2), np.zeros((5, 3)), InputError, r"Linear: .* got shape \(5, 3\); expected shape \(n, …, 4\)"),
        (nn.BatchNorm(4), np.zeros((5, 3)), InputError, "BatchNorm: the input does not fit"),
        (nn.LayerNorm(4), np.zeros(4), InputError, r"LayerNorm: the input does not fit; got shape \(4,\)"),
        (nn.Conv2d(1, 2, 3), np.zeros((5, 8, 8)), InputError, "Conv2d: the input is not images"),
        (nn.Conv2d(1, 2, 3), np.zeros((5, 8, 8, 3)), InputError, "Conv2d: the input does not fit"),
        (
            nn.Conv2d(1, 2, 5),
            np.zeros((5, 4, 8, 1)),
            InputError,
            "smaller than the window; got 4 × 8 .* at least 5 × 5",
        ),
        (nn.MaxPool2d(3), np.zeros((5, 2, 2, 1)), InputError, "MaxPool2d: the images are smaller than the window"),
        (nn.Embedding(3, 2), np.zeros((2, 2)), DataError, "Embedding: the input is not integers; got float64"),
        (
            nn.Embedding(3, 2),
            np.array([[0, 1], [3, 1]]),
            DataError,
            r"position \(1, 0\) has no vector; got 3; expected 0 to 2",
        ),
        (nn.CausalAttention(2), np.zeros((5, 4, 10)), InputError, r"got shape \(5, 4, 10\); expected .* multiple of 6"),
        (nn.CausalAttention(2), np.zeros((5, 12)), InputError, r"CausalAttention: .* got shape \(5, 12\)"),
        (nn.PositionEmbedding(3, 2), np.zeros((5, 4, 2)), InputError, r"got shape \(5, 4, 2\); .* at most 3, 2\)"),
        (
            nn.Linear(64, 2),
            np.zeros((5, 8, 8, 1)),
            InputError,
            r"64\); put Flatten\(\) before it, or, of digits",
        ),
        (nn.Unembedding(3, 2), np.zeros((5, 3)), InputError, "Unembedding: the input does not fit"),
        (nn.Residual(nn.Linear(3, 2)), np.zeros((4, 3)), InputError, r"Residual: .* got \(4, 2\); expected \(4, 3\)"),
    ],
)
def test_wrong_inputs_are_named(layer, x, error, message):
    with pytest.raises(error, match=message):
        layer.forward(_params(layer), x, nn.Call())
