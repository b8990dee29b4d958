"""Network: the model contract, memory, dtypes, and learning something."""

import tracemalloc

import numpy as np
import pytest

from mpitrain import nn
from mpitrain._errors import DataError, DtypeError, InputError
from mpitrain.arrays import Batch, FlatBuffer, Key


def _digits_like(n=32, dtype=np.float32):
    random = np.random.default_rng(0)
    return Batch(random.random((n, 8, 8, 1)).astype(dtype), random.integers(0, 10, n), np.arange(n))


def _ready(net, seed=0):
    params, grads = FlatBuffer(net.layout), FlatBuffer(net.layout)
    net.initialise(params, Key(seed))
    return params, grads


def _cnn(dtype="float32", **options):
    return nn.Network(nn.MODELS["cnn"]((8, 8, 1), 10, **options), nn.CrossEntropy(), dtype)


def test_second_step_allocates_nothing_sizeable():
    net, batch = _cnn(dropout=0.0), _digits_like(256)
    params, grads = _ready(net)
    net.loss_and_gradients(params, batch, grads, Key(1))
    misses = net.pool.misses
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        net.loss_and_gradients(params, batch, grads, Key(1).at(2))
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    smallest_activation_bytes = 256 * 8 * 8 * 16 * 4
    assert net.pool.misses == misses
    assert peak - before < smallest_activation_bytes / 4  # NumPy's own buffers, of a fixed size
    assert after - before < 8192


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_array_keeps_the_dtype(dtype):
    net, batch = _cnn(dtype), _digits_like(dtype=np.float64)
    params, grads = _ready(net)
    net.loss_and_gradients(params, batch, grads, Key(1))
    net.sums(params, batch)
    lent = {key[2] for key in net.pool._free}
    assert lent <= {np.dtype(dtype), np.dtype(bool)}
    assert net.predict(params, batch.inputs).dtype == dtype


def test_gradients_are_added_and_repeatable():
    net, batch = _cnn("float64"), _digits_like()
    params, once = _ready(net)
    first = net.loss_and_gradients(params, batch, once, Key(1))
    twice = FlatBuffer(net.layout)
    assert net.loss_and_gradients(params, batch, twice, Key(1)) == first
    np.testing.assert_array_equal(twice.flat, once.flat)
    net.loss_and_gradients(params, batch, twice, Key(1))
    np.testing.assert_allclose(twice.flat, 2 * once.flat, rtol=1e-12, atol=1e-13)


def test_parts_add_up_to_the_batch():
    net = nn.Network(nn.MODELS["mlp"](6, 3, hidden=[5], dropout=0.4), nn.CrossEntropy(), "float64")
    random = np.random.default_rng(0)
    x, labels = random.standard_normal((7, 6)), random.integers(0, 3, 7)
    params, whole = _ready(net)
    loss, count = net.loss_and_gradients(params, Batch(x, labels, np.arange(7)), whole, Key(1))
    parts, sums = FlatBuffer(net.layout), np.zeros(2)
    for rows in np.split(np.arange(7), [3, 3, 5]):
        sums += net.loss_and_gradients(params, Batch(x[rows], labels[rows], rows), parts, Key(1))
    np.testing.assert_allclose(sums, [loss, count], rtol=1e-13)
    np.testing.assert_allclose(parts.flat, whole.flat, rtol=1e-12, atol=1e-14)


def test_predict_gives_new_arrays_of_any_length():
    net, batch = _cnn(), _digits_like(600)
    params, _ = _ready(net)
    whole = net.predict(params, batch.inputs)
    kept = whole.copy()
    assert whole.shape == (600, 10)
    np.testing.assert_allclose(net.predict(params, batch.inputs[590:]), whole[590:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(net.predict(params, batch.inputs[:10]), whole[:10], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(whole, kept)
    assert net.predict(params, batch.inputs[:0]).shape == (0, 10)


class _Watched(nn.GPT):
    """Keeps how many tokens each pass was given."""

    def forward(self, params, x, call):
        self.seen.append(x.size)
        return super().forward(params, x, call)


@pytest.mark.parametrize("n", [0, 1, 23])
def test_texts_are_evaluated_a_few_tokens_at_a_time(monkeypatch, n):
    layer = _Watched(5, context=6, layers=1, width=4, heads=2)
    layer.seen = []
    net = nn.Network(layer, nn.CrossEntropy(unit="token"), "float64")
    params, _ = _ready(net)
    tokens = np.random.default_rng(0).integers(0, 5, (n, 7))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.arange(n), np.linspace(0.5, 2.0, n))
    outputs = net.predict(params, batch.inputs)
    whole = net.loss.sums(outputs, batch)
    monkeypatch.setattr("mpitrain.nn.network._PREDICT_TOKENS", 25)
    layer.seen.clear()
    found = net.sums(params, batch)
    assert layer.seen == ([24] * (n // 4) + [6 * (n % 4)] if n else [0])
    assert found.keys() == whole.keys() >= {"loss", "count", "correct", "confusion"}
    for name, value in whole.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-14, err_msg=name)
    np.testing.assert_allclose(net.predict(params, batch.inputs), outputs, rtol=1e-14)


def test_evaluation_needs_no_positions_and_ignores_dropout():
    net, batch = _cnn(dropout=0.9), _digits_like()
    params, _ = _ready(net)
    np.testing.assert_array_equal(net.predict(params, batch.inputs), net.predict(params, batch.inputs))


def test_initial_values_depend_on_key_and_name_alone():
    small = nn.Network(nn.Sequential(nn.Linear(4, 3)), nn.MeanSquaredError())
    large = nn.Network(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), nn.MeanSquaredError())
    (a, _), (b, _), (c, _) = _ready(small), _ready(large), _ready(small, seed=1)
    np.testing.assert_array_equal(a.views["0.weight"], b.views["0.weight"])
    assert (a.views["0.weight"] != c.views["0.weight"]).all()
    stage = FlatBuffer(large.layout.select(["1.weight"]))
    large.initialise(stage, Key(0))
    np.testing.assert_array_equal(stage.views["1.weight"], b.views["1.weight"])


def test_non_contiguous_and_integer_inputs():
    net = nn.Network(nn.Linear(3, 2), nn.MeanSquaredError(), "float64")
    params, _ = _ready(net)
    x = np.arange(24, dtype=np.uint8).reshape(3, 8)[:, ::2][:, 1:].T[:2].repeat(2, axis=0)
    expected = x.astype(float) @ params.views["weight"] + params.views["bias"]
    np.testing.assert_allclose(net.predict(params, x), expected, rtol=1e-14)


def test_least_squares_reaches_the_closed_form():
    random = np.random.default_rng(0)
    x = random.standard_normal((50, 3))
    y = x @ [1.0, -2.0, 0.5] + 0.3 + 0.1 * random.standard_normal(50)
    net = nn.Network(nn.MODELS["linear"](3, 1), nn.MeanSquaredError(), "float64")
    params, grads = _ready(net)
    for _ in range(400):
        grads.zero()
        _, count = net.loss_and_gradients(params, Batch(x, y, np.arange(50)), grads, Key(0))
        params.flat -= 0.2 * grads.flat / count
    expected = np.linalg.lstsq(np.column_stack([x, np.ones(50)]), y, rcond=None)[0]
    np.testing.assert_allclose(params.views["1.weight"][:, 0], expected[:3], rtol=1e-9)
    np.testing.assert_allclose(params.views["1.bias"], expected[3:], rtol=1e-9)


def test_bigram_learns_the_frequencies():
    text = np.array([0, 1, 0, 1, 0, 2, 0, 1, 2, 2, 0, 1, 0])
    net = nn.Network(nn.MODELS["bigram"](3), nn.CrossEntropy(), "float64")
    params, grads = _ready(net)
    batch = Batch(text[None, :-1], text[None, 1:], np.arange(1))
    for _ in range(1000):
        grads.zero()
        _, count = net.loss_and_gradients(params, batch, grads, Key(0))
        params.flat -= 5.0 * grads.flat / count
    table = np.exp(params.views["0.weight"][0])
    np.testing.assert_allclose(table[1:] / table.sum(), [4 / 5, 1 / 5], rtol=2e-3)


@pytest.mark.parametrize("dtype", ["float16", "int32", "nonsense"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(DtypeError, match="expected float32 or float64"):
        nn.Network(nn.Linear(2, 2), nn.MeanSquaredError(), dtype)


def test_inputs_that_are_not_numbers_are_refused():
    net = nn.Network(nn.Linear(2, 2), nn.MeanSquaredError())
    params, _ = _ready(net)
    with pytest.raises(DataError, match="inputs are not numbers; got <U1"):
        net.predict(params, np.array([["a", "b"]]))


@pytest.mark.parametrize("layer", [nn.Linear(2, 2), nn.Embedding(4, 2)])
def test_a_list_is_no_array_to_predict_from(layer):
    net = nn.Network(layer, nn.MeanSquaredError())
    params, _ = _ready(net)
    with pytest.raises(DataError, match="inputs are no array; got list"):
        net.predict(params, [[1, 2]])


def test_presets_and_losses_by_name():
    assert set(nn.MODELS) == {"bigram", "cnn", "gpt", "linear", "mlp"}
    assert {"bce": nn.BinaryCrossEntropy, "cross_entropy": nn.CrossEntropy, "mse": nn.MeanSquaredError} == nn.LOSSES
    mlp = nn.MODELS["mlp"](64, 10, hidden=[32, 16], activation="gelu", dropout=0.1, batch_norm=True)
    kinds = [type(layer).__name__ for layer in mlp.layers]
    assert kinds == ["Flatten", *["Linear", "BatchNorm", "GELU", "Dropout"] * 2, "Linear"]
    cnn = nn.MODELS["cnn"]((8, 8, 1), 10)
    assert [type(layer).__name__ for layer in cnn.layers] == [
        *["Conv2d", "BatchNorm", "ReLU"] * 2, "MaxPool2d", "Flatten", "Linear", "ReLU", "Dropout", "Linear"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.MODELS["mlp"](4, 2, activation="rleu"), "unknown activation; got 'rleu'; expected gelu or relu"),
        (lambda: nn.MODELS["mlp"](4, 2, hidden=8), r"mlp: hidden is of another kind; got int: 8; expected sizes"),
        (lambda: nn.MODELS["cnn"](8, 2), r"cnn: input_shape is of another kind; got int: 8; expected \(height, width"),
        (lambda: nn.MODELS["cnn"]((8, 8, 1), 2, channels=4), r"cnn: channels is of another kind; got int: 4; expected"),
        (lambda: nn.MODELS["cnn"]((8, 8), 2), r"cnn: input_shape is wrong; got \(8, 8\); expected \(height, width"),
        (lambda: nn.MODELS["cnn"]((2, 2, 1), 2, channels=[2, 2], pool_every=1), "pooling leaves nothing of the images"),
        (lambda: nn.MODELS["cnn"]((8, 8, 1), 2, kernel_size=4), "kernel_size is even; got 4; expected an odd number"),
    ],
)
def test_wrong_preset_options_are_named(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_exports_are_sorted_and_there():
    names = nn.__all__
    assert len(set(names)) == len(names)
    assert all(hasattr(nn, name) for name in names)
    constants, classes, functions = (
        [n for n in names if n.isupper()],
        [n for n in names if n[0].isupper() and not n.isupper()],
        [n for n in names if n.islower()],
    )
    assert names == sorted(constants) + sorted(classes) + sorted(functions)
