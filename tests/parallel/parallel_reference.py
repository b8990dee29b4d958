"""The serial results: float64, one process, no method and no communicator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpitrain.arrays import Batch, FlatBuffer, Key, Layout
from mpitrain.method.method import Schedule
from mpitrain.nn import Network
from mpitrain.optim import Optimizer

Named = dict[str, np.ndarray]

MeanGradient = Callable[[FlatBuffer, int], FlatBuffer]
"""Gives the mean gradient at some parameters and step (from 0)."""


def buffer(layout: Layout, flat: np.ndarray) -> FlatBuffer:
    """Return a float64 copy of a flat range."""
    made = FlatBuffer(layout.astype(np.float64))
    made.flat[...] = flat
    return made


def mlp_gradients(params: Named, batch: Batch) -> tuple[float, Named]:
    """Return the loss and gradients of Linear, tanh, Linear under a weighted cross-entropy, summed over the batch."""
    rows = np.arange(len(batch))
    x = batch.inputs.reshape(len(batch), -1)
    weights = np.ones(len(batch)) if batch.weights is None else batch.weights
    hidden = np.tanh(x @ params["1.weight"] + params["1.bias"])
    logits = hidden @ params["3.weight"] + params["3.bias"]
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -(weights * np.log(chances[rows, batch.targets])).sum()
    d_logits = chances.copy()
    d_logits[rows, batch.targets] -= 1.0
    d_logits *= weights[:, None]
    d_hidden = (d_logits @ params["3.weight"].T) * (1.0 - hidden**2)
    return float(loss), {
        "1.weight": x.T @ d_hidden,
        "1.bias": d_hidden.sum(0),
        "3.weight": hidden.T @ d_logits,
        "3.bias": d_logits.sum(0),
    }


def mlp_mean_gradient(params: FlatBuffer, batch: Batch) -> tuple[float, FlatBuffer]:
    """Return the mean loss and gradient of `mlp_gradients`, in a buffer."""
    loss, sums = mlp_gradients(params.views, batch)
    mean = FlatBuffer(params.layout)
    for name, values in sums.items():
        mean.views[name][...] = values / len(batch)
    return loss / len(batch), mean


def network_mean_gradient(
    network: Network, params: FlatBuffer, microbatches: list[Batch], keys: list[Key]
) -> tuple[float, FlatBuffer]:
    """Return the mean loss and gradient of a float64 network on whole microbatches, which nothing else shares."""
    grads = FlatBuffer(params.layout)
    parts = [
        network.loss_and_gradients(params, batch, grads, key) for batch, key in zip(microbatches, keys, strict=True)
    ]
    loss, count = np.sum(parts, axis=0)
    grads.flat /= count
    return float(loss / count), grads


def descend(
    start: FlatBuffer,
    optimizer: Optimizer,
    mean_gradient: MeanGradient,
    steps: int,
    schedule: Schedule,
    clip_value: float = np.inf,
    clip_norm: float = np.inf,
) -> FlatBuffer:
    """Return the parameters after some steps from ``start``."""
    params = buffer(start.layout, start.flat)
    shard = params.layout.whole()
    state = optimizer.init(shard)
    for step in range(steps):
        grads = mean_gradient(params, step)
        clip(grads, clip_value, clip_norm)
        totals = optimizer.partials(params.flat, grads.flat, state, step + 1, shard)
        optimizer.update(params.flat, grads.flat, state, schedule(step + 1), step + 1, shard, totals)
    return params


def clip(grads: FlatBuffer, clip_value: float, clip_norm: float) -> None:
    """Clip what is trained in place, by value and then by the norm of everything together."""
    trained = [grads.views[segment.name] for segment in grads.layout if segment.group != "statistics"]
    for view in trained:
        np.clip(view, -clip_value, clip_value, out=view)
    norm = np.linalg.norm(np.concatenate([view.ravel() for view in trained]))
    for view in trained:
        view *= min(1.0, clip_norm / norm)


def assert_close(found: FlatBuffer | Named, expected: FlatBuffer | Named, bound: float) -> None:
    """Require ‖found − expected‖ ≤ bound · ‖expected‖ ≠ 0 of every tensor."""
    found, expected = (each.views if isinstance(each, FlatBuffer) else each for each in (found, expected))
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        size = np.linalg.norm(right)
        assert size > 0, f"{name}: the reference is zero, which proves nothing"
        error = np.linalg.norm(found[name].astype(np.float64) - right)
        assert error <= bound * size, f"{name}: off by {error / size:.2e} of its norm"
