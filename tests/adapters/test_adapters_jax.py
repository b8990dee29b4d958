"""A JAX function and its parameters as a model: gradients under every method are those of a closed form."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="needs JAX")
from feeds import UnevenFeed  # noqa: E402
from jax import numpy as jnp  # noqa: E402

from mpitrain import Batch, DataParallel, GradientParallel, Key, Plan, optim  # noqa: E402
from mpitrain._errors import DataError, DtypeError, InputError  # noqa: E402
from mpitrain.adapters import JaxModel  # noqa: E402
from mpitrain.arrays import FlatBuffer  # noqa: E402
from mpitrain.comm import LocalWorld  # noqa: E402

ROWS, CLASSES = 10, 3
METHODS = {
    "data": DataParallel,
    "gradient 1": GradientParallel,
    "gradient 2": partial(GradientParallel, stage=2, bucket_bytes=256),
    "gradient 3": partial(GradientParallel, stage=3, bucket_bytes=256),
}


@pytest.fixture(autouse=True)
def float64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def outputs(params, inputs):
    hidden = jnp.tanh(inputs @ params["layers"][0]["w"] + params["layers"][0]["b"])
    return hidden @ params["layers"][1]["w"] + params["layers"][1]["b"]


def loss_sum(params, batch, key):
    chosen = jax.nn.log_softmax(outputs(params, batch["inputs"]))
    return -(batch["weights"] * jnp.take_along_axis(chosen, batch["targets"][:, None], 1)[:, 0]).sum()


def parameters():
    random = np.random.default_rng(0)
    return {
        "layers": [
            {"w": random.standard_normal((6, 5)), "b": random.standard_normal(5)},
            {"w": random.standard_normal((5, CLASSES)), "b": random.standard_normal(CLASSES)},
        ],
        "unused": np.ones(2),
    }


def samples():
    random = np.random.default_rng(1)
    return random.standard_normal((ROWS, 6)), random.integers(0, CLASSES, ROWS)


def closed_form(inputs, labels):
    """The mean loss and gradient on all samples."""
    first, second = parameters()["layers"]
    hidden = np.tanh(inputs @ first["w"] + first["b"])
    chances = np.exp(hidden @ second["w"] + second["b"])
    chances /= chances.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -np.log(chances[rows, labels]).mean()
    d = chances.copy()
    d[rows, labels] -= 1
    d /= len(labels)
    d_hidden = (d @ second["w"].T) * (1 - hidden**2)
    return loss, {
        "layers.0.w": inputs.T @ d_hidden, "layers.0.b": d_hidden.sum(0), "layers.1.w": hidden.T @ d,
        "layers.1.b": d.sum(0), "unused": np.zeros(2),
    }  # fmt: skip


def trained(make, model, comm, feed, microbatches=2):
    method = make(comm, microbatches=microbatches)
    method.setup(model, optim.SGD(), Plan(Key(1), lambda step: 1.0, 1))
    before = {name: view.copy() for name, view in method.whole().views.items()}
    comm.barrier()  # parameters may be one memory for all
    return method, before, method.advance(feed, 1)


@pytest.mark.mpi
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_serial(world, method):
    inputs, labels = samples()
    loss, expected = closed_form(inputs, labels)
    model = JaxModel(loss_sum, parameters(), outputs)
    found, before, progress = trained(METHODS[method], model, world, UnevenFeed(inputs, labels))
    assert progress.loss == pytest.approx(loss, rel=1e-12)
    assert before.keys() == expected.keys()
    after = found.whole().views
    for name, gradient in expected.items():
        got = before[name] - after[name]
        assert np.linalg.norm(got - gradient) <= 1e-10 * np.linalg.norm(gradient), name
    np.testing.assert_allclose(found.predict(inputs).shape, (ROWS, CLASSES))
    batch = Batch(inputs[:4], labels[:4], np.arange(4))
    logits = found.predict(inputs[:4])
    expected_loss = (np.log(np.exp(logits).sum(1)) - logits[np.arange(4), labels[:4]]).mean()
    assert found.evaluate([batch])["loss"] == pytest.approx(expected_loss, rel=1e-12)


@pytest.mark.mpi
def test_integers_are_exact(world):
    random = np.random.default_rng(0)
    inputs, wanted = (random.integers(-8, 9, (8, size)).astype(np.float32) for size in (5, 3))
    model = JaxModel(
        lambda params, batch, key: (batch["inputs"] @ params * batch["targets"]).sum(), np.zeros((5, 3), np.float32)
    )
    found, _, _ = trained(GradientParallel, model, world, UnevenFeed(inputs, wanted))
    assert np.array_equal(found.params.views["parameters"], -(inputs.T @ wanted) / 8)


def alone(model, *feed):
    (found,) = LocalWorld(1).run(lambda comm: trained(DataParallel, model, comm, UnevenFeed(*feed), 1))
    return found


def test_keys_name_step_microbatch_and_share():
    def noise(params, batch, key):
        return (params * (0.0 if key is None else jax.random.normal(key, params.shape))).sum() + batch["inputs"].sum()

    model = JaxModel(noise, np.zeros(4))
    params, found = FlatBuffer(model.layout), []
    for key, first in ((Key(0), 0), (Key(0), 0), (Key(0).at(1), 0), (Key(0).child("microbatch1"), 0), (Key(0), 1)):
        grads = FlatBuffer(model.layout)
        model.loss_and_gradients(params, Batch(np.ones((2, 1)), np.zeros(2), np.arange(2) + first), grads, key)
        found.append(grads.sha256())
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_of_no_samples_nothing_is_predicted():
    """A function that flattens samples in the usual words, which fail where there are none."""
    model = JaxModel(loss_sum, parameters(), lambda params, inputs: outputs(params, inputs.reshape(len(inputs), -1)))
    found = model.predict(FlatBuffer(model.layout), np.zeros((0, 3, 2)))
    assert (found.shape, found.dtype) == ((0, CLASSES), np.float64)


@pytest.mark.parametrize("inputs", [[], [[1.0, 2.0]]])
def test_a_list_is_no_array_to_predict_from(inputs):
    model = JaxModel(loss_sum, parameters(), outputs)
    with pytest.raises(DataError, match=r"^JaxModel: the inputs are no array; got list; .*numpy\.asarray"):
        model.predict(FlatBuffer(model.layout), inputs)


def test_misuse_is_an_error():
    inputs, labels = samples()
    mean = JaxModel(lambda params, batch, key: loss_sum(params, batch, key) / len(batch["targets"]), parameters())
    with pytest.raises(InputError, match=r"the loss is a mean over the batch.*twice"):
        alone(mean, inputs, labels)
    with pytest.raises(InputError, match=r"the loss is no number; got float64 of shape \(10,\)"):
        alone(JaxModel(lambda params, batch, key: batch["weights"], parameters()), inputs, labels)
    with pytest.raises(InputError, match="the loss is no number; got NoneType"):
        alone(JaxModel(lambda params, batch, key: None, parameters()), inputs, labels)
    with pytest.raises(InputError, match="no predict"):
        mean.predict(FlatBuffer(mean.layout), inputs)
    with pytest.raises(DtypeError, match="got float32, float64"):
        JaxModel(loss_sum, {"a": np.ones(2), "b": np.ones(2, np.float32)})
    with pytest.raises(DtypeError, match="got no arrays"):
        JaxModel(loss_sum, {})
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(DtypeError, match="jax_enable_x64"):
        JaxModel(loss_sum, parameters())
