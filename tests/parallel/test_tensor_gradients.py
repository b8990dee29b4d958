"""A model that ranks divide has the numbers of the whole one: initial values, losses, gradients, metrics, outputs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from tensor_cases import MODELS, VOCABULARY, Model, batch_for, boxes, initial, sum_terms, text

from mpitrain import nn
from mpitrain._errors import DataError, InputError
from mpitrain.arrays import Batch, FlatBuffer, Key
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.nn import Embedding, Linear, ReLU, Sequential
from mpitrain.parallel.tensor import (
    ColumnLinear,
    Portion,
    RowLinear,
    TensorGPT,
    TensorNetwork,
    VocabularyCrossEntropy,
    VocabularyEmbedding,
    split_mlp,
)

BOUND = 1e-12
RNG = Key(3).child("train").at(5)


def moved(network: nn.Network) -> FlatBuffer:
    """Initial values with biases and shifts that are not zero, so that one that is added twice shows."""
    params = initial(network)
    for name, view in params.views.items():
        if name.endswith(("bias", "beta")):
            view += 0.1 * np.arange(view.size).reshape(view.shape)
    return params


def check_pass(comm: Communicator, model: Model, rows: int, batch: Batch | None = None) -> None:
    """Loss, count and every gradient, per tensor."""
    serial, divided = model.serial(), model.divided(comm)
    batch = batch or batch_for(model, rows)
    whole, part = moved(serial), FlatBuffer(divided.layout)
    for name, values in boxes(divided.layout, whole.views).items():
        part.views[name][...] = values
    expected, found = FlatBuffer(serial.layout), FlatBuffer(divided.layout)
    loss = serial.loss_and_gradients(whole, batch, expected, RNG)
    assert divided.loss_and_gradients(part, batch, found, RNG) == pytest.approx(loss, rel=BOUND)
    sum_terms(comm, found)
    if rows:
        named = {segment.name: segment for segment in divided.layout}
        ours = {name: found.views[name] for name in named}
        theirs = boxes(divided.layout, {name: expected.views[name] for name in named})
        for name in named:
            size = np.linalg.norm(expected.views[name])
            assert size > 0
            assert np.linalg.norm(ours[name] - theirs[name]) <= BOUND * size, name
    else:
        assert not found.flat.any()


WITH_NONE = ("mlp of four", "gpt, sequence")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        *((name, 5) for name in MODELS),
        *(pytest.param(name, 0, marks=[] if name in WITH_NONE else pytest.mark.slow) for name in MODELS),
    ],
)
def test_gradients_are_those_of_the_whole_model(on_ranks, name, rows):
    on_ranks(check_pass, MODELS[name], rows)


@pytest.mark.parametrize("name", ["gpt", "gpt, sequence"])
def test_a_sequence_may_be_shorter_than_the_ranks_are_many(on_ranks, name):
    on_ranks(check_pass, MODELS[name], 4, text(4, 2))


class Integers(nn.MeanSquaredError):
    """Sums of squares: of integers, they and their gradients are integers."""

    def evaluate(self, outputs: np.ndarray, targets: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        np.subtract(outputs, targets, out=gradient)
        losses = (gradient * gradient).reshape(len(outputs), -1).sum(axis=1)
        gradient *= 2
        return losses


def check_exact(comm: Communicator, whole: Sequential, part: Sequential, batch: Batch) -> None:
    """Whole numbers in float32, so that no order of additions shows."""
    serial = nn.Network(whole, Integers(), np.float32)
    divided = TensorNetwork(part, Integers(), comm, np.float32)
    params, parts = FlatBuffer(serial.layout), FlatBuffer(divided.layout)
    params.flat[...] = np.random.default_rng(8).integers(-2, 3, params.flat.shape)
    for name, values in boxes(divided.layout, params.views).items():
        parts.views[name][...] = values
    expected, found = FlatBuffer(serial.layout), FlatBuffer(divided.layout)
    loss = serial.loss_and_gradients(params, batch, expected, RNG)
    assert loss[0] > 0
    assert divided.loss_and_gradients(parts, batch, found, RNG) == loss
    sum_terms(comm, found)
    for name, values in boxes(divided.layout, expected.views).items():
        assert expected.views[name].any()
        np.testing.assert_array_equal(found.views[name], values)
    np.testing.assert_array_equal(divided.predict(parts, batch.inputs), serial.predict(params, batch.inputs))


def check_exact_mlp(comm: Communicator, sizes: list[int]) -> None:
    layers = [Linear(a, b) for a, b in pairwise(sizes)]
    whole = Sequential(*[each for layer in layers for each in (layer, ReLU())][:-1])
    rng = np.random.default_rng(1)
    batch = Batch(rng.integers(-3, 4, (5, sizes[0])), rng.integers(-3, 4, (5, sizes[-1])), np.arange(5))
    check_exact(comm, whole, split_mlp(whole, Portion(comm.rank, comm.size)), batch)


@pytest.mark.parametrize("sizes", [[5, 7, 2], [5, 7, 6, 2], [5, 7, 6, 5, 1], [5, 2]], ids=str)
def test_whole_numbers_give_the_same_bits_in_a_perceptron(on_ranks, sizes):
    on_ranks(check_exact_mlp, sizes)


def check_exact_text(comm: Communicator, sequence: bool) -> None:
    """Embedding, column, row, column, row: everything that goes along the sequence."""
    pair = [Linear(4, 6), Linear(6, 4), Linear(4, 5), Linear(5, 2)]
    table, portion = Embedding(VOCABULARY, 4), Portion(comm.rank, comm.size)
    part = Sequential(
        VocabularyEmbedding(table, portion, sequence),
        ColumnLinear(pair[0], portion, sequence=sequence),
        ReLU(),
        RowLinear(pair[1], portion, sequence=sequence),
        ColumnLinear(pair[2], portion, sequence=sequence),
        ReLU(),
        RowLinear(pair[3], portion),
    )
    whole = Sequential(table, pair[0], ReLU(), pair[1], pair[2], ReLU(), pair[3])
    tokens = text(4)
    targets = np.random.default_rng(2).integers(-3, 4, (*tokens.inputs.shape, 2))
    check_exact(comm, whole, part, Batch(tokens.inputs, targets, tokens.index))


@pytest.mark.parametrize("sequence", [False, True])
def test_whole_numbers_give_the_same_bits_in_text(on_ranks, sequence):
    on_ranks(check_exact_text, sequence)


def check_outputs(comm: Communicator, model: Model) -> None:
    """Outputs are whole, metrics those of all classes, whatever the length of the sequence."""
    serial, divided = model.serial(), model.divided(comm)
    whole, part = moved(serial), FlatBuffer(divided.layout)
    for name, values in boxes(divided.layout, whole.views).items():
        part.views[name][...] = values
    batches = [batch_for(model, rows) for rows in (5, 0)]
    batches += [text(3, length) for length in (1, 2, 6)] if model.kind == "gpt" else []
    for batch in batches:
        expected = serial.predict(whole, batch.inputs)
        np.testing.assert_allclose(divided.predict(part, batch.inputs), expected, rtol=1e-12, atol=1e-13)
        found, sums = divided.sums(part, batch), serial.sums(whole, batch)
        assert found.keys() == sums.keys()
        for name, value in sums.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-12)


@pytest.mark.parametrize("name", ["mlp of three", "gpt", "gpt, sequence"])
def test_outputs_and_metrics_are_those_of_the_whole_model(on_ranks, name):
    on_ranks(check_outputs, MODELS[name])


def check_loss(comm: Communicator, classes: int, smoothing: float) -> None:
    """Scores of any size, some of them equal, labels on every rank."""
    rng = np.random.default_rng(3)
    scores = np.round(rng.standard_normal((9, 3, classes)) * 3) * 100.0
    labels = rng.integers(0, classes, (9, 3))
    labels[0] = 0, classes - 1, classes // 2
    batch = Batch(np.empty((9, 3)), labels, np.arange(9), rng.random(9))
    loss = VocabularyCrossEntropy(classes, comm, smoothing)
    start, stop = Portion(comm.rank, comm.size).span(classes, "classes")
    part = np.ascontiguousarray(scores[..., start:stop])
    whole = nn.CrossEntropy(smoothing)
    (found, context), (expected, kept) = (
        each.forward(outputs, batch, nn.Pool()) for each, outputs in ((loss, part), (whole, scores))
    )
    assert found == pytest.approx(expected, rel=1e-13)
    np.testing.assert_allclose(loss.backward(context), whole.backward(kept)[..., start:stop], rtol=1e-12, atol=1e-15)
    sums, theirs = loss.sums(part, batch), whole.sums(scores, batch)
    assert sums.keys() == theirs.keys()
    for name in sums.keys() - {"loss"}:
        np.testing.assert_array_equal(sums[name], theirs[name])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("classes", [4, 67, 1201])
def test_cross_entropy_is_that_of_all_classes(on_ranks, classes, smoothing):
    on_ranks(check_loss, classes, smoothing)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            {"heads": 2, "width": 20},
            "more ranks than heads; got 2 heads on 3 ranks; expected one at least for each rank",
        ),
        ({"hidden": 2}, "more ranks than outputs of a layer; got 2 outputs of a layer on 3 ranks"),
    ],
)
def test_more_ranks_than_there_is_to_divide_is_said(what, message):
    gpt = nn.GPT(VOCABULARY, 7, **({"layers": 1, "width": 20, "heads": 5} | what))
    with pytest.raises(InputError) as caught:
        TensorGPT(gpt, Portion(0, 3))
    assert message in str(caught.value)


def test_a_label_out_of_range_is_named_by_all_classes():
    def check(comm: Communicator) -> None:
        loss = VocabularyCrossEntropy(5, comm)
        loss.check((2, 3), np.array([4, 5]))

    with pytest.raises(DataError, match="position 1 is out of range; got 5; expected 0 to 4"):
        LocalWorld(2).run(check)


def test_what_cannot_be_divided_is_said():
    with pytest.raises(InputError, match="a layer needs all features, which are divided there; got LayerNorm"):
        split_mlp(Sequential(Linear(3, 4), nn.LayerNorm(4), Linear(4, 2)), Portion(0, 2))
