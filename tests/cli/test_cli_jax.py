"""A JAX function as a job's model, fully sharded: trained, continued in another way on other ranks, and made use of."""

import numpy as np
import pytest
from commands import mpitrain, settings, write_data

pytest.importorskip("jax", reason="needs JAX")

MODEL = """
import jax
import numpy as np
from jax import numpy as jnp

from mpitrain.adapters import JaxModel

jax.config.update("jax_enable_x64", True)


def outputs(params, inputs):
    for each in params[:-1]:
        inputs = jnp.tanh(inputs @ each["w"] + each["b"])
    return inputs @ params[-1]["w"] + params[-1]["b"]


def build(mean=False):
    random = np.random.default_rng(0)
    params = [{"w": random.standard_normal(s) / 2, "b": np.zeros(s[1])} for s in ((5, 8), (8, 8), (8, 3))]

    def loss(params, batch, key):
        chosen = jax.nn.log_softmax(outputs(params, batch["inputs"]))
        losses = -jnp.take_along_axis(chosen, batch["targets"][:, None], 1)[:, 0]
        return losses.mean() if mean else losses.sum()

    return JaxModel(loss, params, outputs)
"""
JOB = """
dtype = "float64"

[data]
source = "npz"
path = "data.npz"

[model]
build = "my.py:build"

[optimizer]
kind = "adam"
lr = 0.01

[train]
batch_size = 8
steps = 3
"""


def run(folder, ranks, *options, **values):
    launched = ("-n", str(ranks)) if ranks > 1 else ()
    done = mpitrain("run", *launched, "job.toml", *settings(**values), "--json", "--quiet", *options, cwd=folder)
    assert done.code == 0, done.err
    return done.result


@pytest.fixture
def folder(tmp_path):
    write_data(tmp_path)
    (tmp_path / "my.py").write_text(MODEL)
    (tmp_path / "job.toml").write_text(JOB)
    return tmp_path


SHARDED = {"method__kind": "gradient", "method__stage": 3}


@pytest.mark.slow
def test_a_sharded_run_goes_on_as_any_other_and_ends_as_on_one_rank(folder):
    """On three ranks a batch of eight is uneven."""
    run(folder, 3, "--run-dir", "run", **SHARDED)
    last = run(folder, 2, "--resume", "run", train__steps=6, method__kind="data_parallel")
    alone = run(folder, 1, "--run-dir", "alone", train__steps=6)
    assert last["steps"] == 6
    assert last["metrics"] == pytest.approx(alone["metrics"], rel=1e-10)
    np.save(folder / "inputs.npy", np.ones((2, 5)))
    assert mpitrain("predict", "run", "inputs.npy", cwd=folder).code == 0


def test_it_is_verified_as_any_other(folder):
    done = mpitrain("verify", "job.toml", "-n", "2", "--steps", "2", "--json", *settings(**SHARDED), cwd=folder)
    assert (done.code, done.result["equal"]) == (0, True)


def test_a_mean_is_refused_in_one_line(folder):
    values = settings(model__options__mean="true", **SHARDED)
    done = mpitrain("run", "-n", "2", "job.toml", *values, "--quiet", cwd=folder)
    assert done.code == 2
    told = [line for line in done.err.splitlines() if "the loss is a mean over the batch" in line]
    assert told  # of each rank that sees it
    assert len(told) == done.err.count("mpitrain: error")
    assert "Traceback" not in done.err
