"""Clipping against PyTorch and NumPy, and the finite check."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpitrain._errors import InputError
from mpitrain.optim import chunks, clip_value, finite, scale, squared_norm


@pytest.fixture
def grads(gradients):
    return gradients[2]


def trained(layout):
    return [segment for segment in layout if segment.group != "statistics"]


@pytest.mark.parametrize("chunk_bytes", [24, 128 * 1024])
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 40])
def test_partial_norms_add_up_to_the_trained_tensors(parts, chunk_bytes, layout, grads, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    total = sum(squared_norm(grads.flat[s.start : s.stop], s) for s in layout.shards(parts))
    expected = math.fsum(float(x) ** 2 for s in trained(layout) for x in grads.views[s.name].flat)
    assert total == pytest.approx(expected, rel=1e-15)


def test_norm_of_large_float32_does_not_overflow(layout):
    flat = np.zeros(layout.size, np.float32)
    flat[0] = flat[9] = 1e30
    assert squared_norm(flat, layout.astype(np.float32).whole()) == pytest.approx(2e60, rel=1e-6)


def test_clipping_by_norm_equals_torch(layout, grads):
    torch = pytest.importorskip("torch")
    tensors = [torch.zeros(s.shape, dtype=torch.float64, requires_grad=True) for s in trained(layout)]
    for tensor, segment in zip(tensors, trained(layout), strict=True):
        tensor.grad = torch.tensor(grads.views[segment.name])
    norm = float(torch.nn.utils.clip_grad_norm_(tensors, 3.0))
    untouched = grads.views["norm.mean"].copy()
    found = math.sqrt(squared_norm(grads.flat, layout.whole()))
    assert found == pytest.approx(norm, rel=1e-14)
    assert found > 3.0
    scale(grads.flat, layout.whole(), 3.0 / (found + 1e-6))  # PyTorch's guard against a norm of zero
    for tensor, segment in zip(tensors, trained(layout), strict=True):
        np.testing.assert_allclose(grads.views[segment.name], tensor.grad.numpy(), rtol=1e-13)
    np.testing.assert_array_equal(grads.views["norm.mean"], untouched)


@pytest.mark.parametrize("parts", [1, 3])
def test_clipping_by_value(parts, layout, grads):
    before = grads.flat.copy()
    for shard in layout.shards(parts):
        clip_value(grads.flat[shard.start : shard.stop], shard, 0.5)
    for segment in layout:
        here = before[segment.offset : segment.stop].reshape(segment.shape)
        expected = here if segment.group == "statistics" else np.minimum(np.maximum(here, -0.5), 0.5)
        np.testing.assert_array_equal(grads.views[segment.name], expected)
    assert np.abs(before).max() > 0.5


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
def test_bad_limits(limit, layout, grads):
    with pytest.raises(InputError, match="clipping: limit is not allowed"):
        clip_value(grads.flat, layout.whole(), limit)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 17, 99_999])
def test_one_bad_element_is_found(dtype, bad, where):
    grads = np.ones(100_000, dtype)
    assert finite(grads)
    grads[where] = bad
    assert not finite(grads)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_values_give_no_false_alarm(dtype):
    grads = np.full(100_000, np.finfo(dtype).max, dtype)
    grads[::2] *= -1
    assert finite(grads)
    grads[77_777] = math.inf
    assert not finite(grads)


def test_nothing_is_finite():
    assert finite(np.zeros(0, np.float32))
